"""Cross entropy in float64, written with PyTorch's own operations, for the tests of both cross entropies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .helpers import TOLERANCES


def reference_loss(
    logits: Tensor,  # (N, V) float64
    labels: Tensor,  # (N,)
    *,
    reduction: str = "mean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    token_scaling: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    valid = labels != ignore_index
    loss = F.cross_entropy(
        z,
        labels,
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    loss = loss + z_loss * torch.where(valid, z.logsumexp(-1).square(), 0)
    safe = labels.where(valid, 0)
    weights = valid.to(z.dtype)
    if class_weights is not None:
        weights = weights * class_weights[safe]
    if token_weights is not None:
        loss, weights = loss * token_weights, weights * token_weights
    if token_scaling:
        loss = loss * z.softmax(-1).detach().gather(1, safe.unsqueeze(1)).squeeze(1)
    if reduction == "none":
        return loss
    if reduction == "sum" or not valid.any():
        return loss.sum()
    return loss.sum() / (weights.sum() if num_items is None else num_items)


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def assert_product_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare what came out of matrix products over operands rounded to dtype with its float64 reference.

    The logits and their gradients are each rounded once before they meet fp32, which is an error of up to eps / 2 of
    every term of the sums that follow: in the 2-norm less than twice eps, in an element up to eps of the largest.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if not actual.numel():
        return
    atol, rtol, _ = TOLERANCES[dtype]
    eps = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    error = (actual - expected).abs()
    assert (error <= atol + rtol * expected.abs() + eps * expected.abs().max()).all(), f"off by {error.max():.3g}"
    assert error.norm() <= 2 * eps * expected.norm() + atol, f"relative error {error.norm() / expected.norm():.3g}"
