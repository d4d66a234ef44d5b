"""Softmax cross entropy over given logits, in one pass forward and one backward."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    check_floating,
    check_labels_in_range,
    check_loss_options,
    check_same_device,
    check_vector,
)
from ._dtypes import accumulation_dtype
from ._library import define, define_differentiable, refuse_double_backward
from ._reduction import loss_scale, row_weights
from ._softmax_loss import RowLoss, softmax_loss_rows

__all__ = ["EXTRA_OUTPUTS", "CrossEntropyOutput", "cross_entropy", "gather_outputs", "requested_outputs"]

EXTRA_OUTPUTS = ("token_loss", "token_accuracy", "predicted_tokens", "z_loss")


class CrossEntropyOutput(NamedTuple):
    """What a cross entropy returns when more than the loss is asked for; what was not asked for is None.

    Only ``loss`` carries a gradient.
    """

    loss: Tensor  # () or, with reduction="none", the labels' shape; fp32
    token_loss: Tensor | None = None  # the labels' shape, fp32: the unreduced loss, 0 where the label is ignored
    token_accuracy: Tensor | None = None  # () fp32: share of the labels not ignored that the largest logit hits
    predicted_tokens: Tensor | None = None  # the labels' shape, int64: argmax of the logits, -1 where ignored
    z_loss: Tensor | None = None  # the z-loss's part of loss, in its shape


def gather_outputs(
    outputs: Collection[str],
    labels: Tensor,  # any shape
    loss: Tensor,
    token_loss: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    predicted: Tensor,  # (N,) or (0,)
    scale: Tensor,  # ()
    *,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    token_weights: Tensor | None,  # (N,)
) -> Tensor | CrossEntropyOutput:
    """Shape the ops' flat results into what the caller asked for."""
    unknown = set(outputs) - set(EXTRA_OUTPUTS)
    if unknown:
        raise ValueError(f"outputs must be among {EXTRA_OUTPUTS}, got {sorted(unknown)}")
    loss = loss.view(labels.shape) if reduction == "none" else loss
    if not outputs:
        return loss
    extra: dict[str, Tensor] = {}
    if "token_loss" in outputs:
        extra["token_loss"] = token_loss.view(labels.shape)
    if "predicted_tokens" in outputs:
        extra["predicted_tokens"] = predicted.view(labels.shape)
    if "token_accuracy" in outputs:
        hits = (predicted == labels.flatten()) & (predicted >= 0)
        extra["token_accuracy"] = hits.sum() / (labels != ignore_index).sum().clamp(min=1)
    if "z_loss" in outputs:
        squares = z_loss * lse.square()
        if token_weights is not None:
            squares = squares * token_weights
        extra["z_loss"] = squares.view(labels.shape) if reduction == "none" else squares.sum() * scale
    return CrossEntropyOutput(loss, **extra)


def requested_outputs(z_loss: bool, token_accuracy: bool, predicted_tokens: bool) -> tuple[str, ...]:
    """The names for ``outputs`` behind a module's ``return_*`` switches."""
    wanted = {"z_loss": z_loss, "token_accuracy": token_accuracy, "predicted_tokens": predicted_tokens}
    return tuple(name for name, switch in wanted.items() if switch)


_OPTIONS = "int ignore_index, str reduction, float inner, float outer, float label_smoothing, float z_loss"


def _make_forward(use_kernel: bool) -> Any:
    def forward(
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        inner: float,
        outer: float,
        label_smoothing: float,
        z_loss: float,
        predict: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n = logits.shape[0]
        dtype = accumulation_dtype(logits.dtype)
        token_loss, lse = logits.new_empty((n,), dtype=dtype), logits.new_empty((n,), dtype=dtype)
        predicted = labels.new_empty(n if predict else 0)
        softmax_loss_rows(
            logits,
            labels,
            RowLoss(ignore_index, inner, outer, label_smoothing, z_loss, False),
            class_weights=weight,
            token_loss=token_loss,
            lse=lse,
            predicted=predicted if predict else None,
            use_kernel=use_kernel,
        )
        if reduction == "none":
            return token_loss.clone(), token_loss, lse, predicted, token_loss.new_ones(())
        scale = loss_scale(
            labels,
            mean=reduction == "mean",
            weights=row_weights(labels, ignore_index, None, weight, dtype),
            divisor_tensor=None,
            divisor=None,
            ignore_index=ignore_index,
            n_processed=n,
            dtype=dtype,
            use_kernel=use_kernel,
        )
        return token_loss.sum() * scale, token_loss, lse, predicted, scale

    return forward


def _fake_forward(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    rows = logits.new_empty((n,), dtype=accumulation_dtype(logits.dtype))
    loss = torch.empty_like(rows) if reduction == "none" else rows.new_empty(())
    predict = options[-1]
    return loss, rows, torch.empty_like(rows), labels.new_empty(n if predict else 0), rows.new_empty(())


def _make_backward(use_kernel: bool) -> Any:
    def backward(
        upstream: Tensor,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        lse: Tensor,
        scale: Tensor,
        ignore_index: int,
        reduction: str,
        inner: float,
        outer: float,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        softmax_loss_rows(
            logits,
            labels,
            RowLoss(ignore_index, inner, outer, label_smoothing, z_loss, False),
            class_weights=weight,
            lse=lse,
            gradient=gradient,
            known_lse=True,
            upstream=upstream,
            scale=scale,
            use_kernel=use_kernel,
        )
        return gradient

    return backward


def _fake_backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_forward = define(
    f"cross_entropy_forward(Tensor logits, Tensor labels, Tensor? weight, {_OPTIONS}, bool predict)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_make_forward(True),
    reference=_make_forward(False),
    fake=_fake_forward,
)
_backward = define(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor labels, Tensor? weight, Tensor lse, Tensor scale, "
    f"{_OPTIONS}) -> Tensor",
    kernel=_make_backward(True),
    reference=_make_backward(False),
    fake=_fake_backward,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        loss, token_loss, lse, predicted, scale = _forward(logits, labels, weight, *options)
        ctx.save_for_backward(logits, labels, weight, lse, scale)
        ctx.options = options[:-1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(token_loss, lse, predicted, scale)
        return loss, token_loss, lse, predicted, scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cross_entropy")
        if upstream is None:
            return (None,) * (3 + len(ctx.options) + 1)
        logits, labels, weight, lse, scale = ctx.saved_tensors
        gradient = _backward(upstream, logits, labels, weight, lse, scale, *ctx.options)
        return (gradient,) + (None,) * (2 + len(ctx.options) + 1)


def _differentiable(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(logits, *arguments)
    return _forward(logits, *arguments)


_op = define_differentiable(
    f"cross_entropy(Tensor logits, Tensor labels, Tensor? weight, {_OPTIONS}, bool predict)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiable,
)


def cross_entropy(
    logits: Tensor,  # (*, V)
    labels: Tensor,  # (*)
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weight: Tensor | None = None,  # (V,)
    outputs: Collection[str] = (),
    check_labels: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy between logits and class indices, as :func:`torch.nn.functional.cross_entropy` has it.

    The logits are read once in the forward and once in the backward, which writes their gradient to a new tensor; no
    fp32 copy is made. Sums are taken in fp32 (in float64 where the logits are).

    Args:
        logits: (\\*, V), any floating point dtype. Contiguous along V, else copied.
        labels: (\\*), integers in [0, V) or ``ignore_index``.
        ignore_index: labels of this value add nothing to the loss and get a zero gradient.
        reduction: ``"mean"`` over the labels not ignored (over their class weights where ``weight`` is given),
            ``"sum"`` or ``"none"``. With no valid label the mean is 0, where PyTorch's is NaN.
        label_smoothing: in [0, 1); Szegedy et al., 2016, https://arxiv.org/abs/1512.00567.
        z_loss: adds ``z_loss * logsumexp(logits)**2`` a token; Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311.
        softcap: the logits become ``softcap * tanh(logits / softcap)``; Gemma Team, 2024,
            https://arxiv.org/abs/2408.00118.
        logit_scale: the logits are multiplied by this first.
        weight: (V,) class weights; no gradient flows to them.
        outputs: names among ``EXTRA_OUTPUTS`` to return besides the loss, none of which carries a gradient.
        check_labels: also check on an accelerator that the labels are in range, which waits for the device.

    Returns:
        The loss in fp32, or a :class:`CrossEntropyOutput` when ``outputs`` names something.

    Raises:
        TypeError: for logits that are not floating point or labels that are not integers.
        ValueError: for shapes that don't match, an option outside its range, tensors on different devices, and, on the
            CPU or with ``check_labels``, a label outside [0, V). Elsewhere such a label makes the loss NaN.
        RuntimeError: in a double backward.
    """
    check_floating(logits=logits)
    check_loss_options(reduction, label_smoothing, z_loss, softcap, 1.0)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, class indices; got {labels.dtype}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have logits' shape without its last dimension, {tuple(logits.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )
    check_same_device(logits.device, labels=labels, weight=weight)
    n_classes = logits.shape[-1]
    check_vector("weight", weight, n_classes, "a weight a class")
    flat_labels = labels.reshape(-1).long()
    if check_labels or (labels.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_labels_in_range(flat_labels, n_classes, ignore_index)
    flat = logits.reshape(-1, n_classes)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    spec = RowLoss.of(ignore_index, logit_scale, softcap, 1.0, label_smoothing, z_loss)
    predict = "token_accuracy" in outputs or "predicted_tokens" in outputs
    loss, token_loss, lse, predicted, scale = _op(
        flat, flat_labels, weight, ignore_index, reduction, *spec[1:5], predict
    )
    return gather_outputs(
        outputs,
        labels,
        loss,
        token_loss,
        lse,
        predicted,
        scale,
        ignore_index=ignore_index,
        reduction=reduction,
        z_loss=z_loss,
        token_weights=None,
    )
