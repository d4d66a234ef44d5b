"""What the losses of single tokens are divided by when they become one number."""

import torch
from torch import Tensor

from ._launch import launch
from ._triton import tl, triton

__all__ = ["REDUCTIONS", "loss_scale", "row_weights"]

REDUCTIONS = ("none", "sum", "mean")


@triton.jit(do_not_specialize=["n_rows", "n_processed", "divisor"])
def _scale_kernel(
    labels_ptr,  # (N,)
    row_weight_ptr,  # (N,) or None: every valid row weighs 1
    divisor_ptr,  # scalar, or None
    scale_ptr,  # scalar out
    n_rows,
    n_processed,
    divisor,
    ignore_index,
    MEAN: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weights = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        mask = rows < n_rows
        counts += (tl.load(labels_ptr + rows, mask=mask, other=ignore_index) != ignore_index).to(tl.int32)
        if row_weight_ptr is not None:
            weights += tl.load(row_weight_ptr + rows, mask=mask, other=0.0)
    count = tl.sum(counts, 0)
    over = tl.full((), 1.0, tl.float32)
    if divisor_ptr is not None:
        over = tl.load(divisor_ptr).to(tl.float32)
    elif DIVISOR:
        over *= divisor
    elif MEAN:
        if row_weight_ptr is not None:
            over = tl.sum(weights, 0)
        else:
            over = count.to(tl.float32)
    if MEAN:
        over = tl.where(count == 0, 1.0, over)
    over = tl.where(count > n_processed, float("nan"), over)
    tl.store(scale_ptr, 1.0 / over)


def row_weights(
    labels: Tensor,  # (N,)
    ignore_index: int,
    token_weights: Tensor | None,  # (N,)
    class_weights: Tensor | None,  # (V,)
    dtype: torch.dtype,
) -> Tensor | None:
    """(N,) what each row adds to the divisor of a weighted mean, 0 where it is ignored; None without weights."""
    if token_weights is None and class_weights is None:
        return None
    weights = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    if token_weights is not None:
        weights = weights * token_weights
    if class_weights is not None:
        weights = weights * class_weights[labels.clamp(0, len(class_weights) - 1)]
    return torch.where(labels == ignore_index, 0, weights)


def loss_scale(
    labels: Tensor,  # (N,)
    *,
    mean: bool,
    weights: Tensor | None,  # (N,), of row_weights
    divisor_tensor: Tensor | None,  # ()
    divisor: float | None,
    ignore_index: int,
    n_processed: int,
    dtype: torch.dtype,
    use_kernel: bool,
) -> Tensor:
    """The factor, (), that turns the sum of the rows' losses into the reduced loss.

    A mean is over the rows' weights (1 each where there are none), or over ``divisor``; with no valid row the factor is
    1. It is NaN if more than ``n_processed`` labels are valid, so that a wrong bound can't pass unseen.
    """
    if use_kernel and dtype == torch.float32:
        scale = torch.empty((), dtype=dtype, device=labels.device)
        launch(
            _scale_kernel,
            (1, 1, 1),
            (
                labels.contiguous(),
                weights,
                divisor_tensor,
                scale,
                labels.shape[0],
                n_processed,
                1.0 if divisor is None else float(divisor),
                ignore_index,
            ),
            (mean, divisor is not None, 1024),
            num_warps=8,
        )
        return scale
    count = (labels != ignore_index).sum()
    one = torch.ones((), dtype=dtype, device=labels.device)
    if divisor_tensor is not None:
        over = divisor_tensor.to(dtype)
    elif divisor is not None:
        over = one * divisor
    elif not mean:
        over = one
    else:
        over = count.to(dtype) if weights is None else weights.sum()
    if mean:
        over = torch.where(count == 0, one, over)
    return 1 / torch.where(count > n_processed, torch.nan, over)
