"""Layer normalization (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_parameter, check_rows
from ._dtypes import accumulation_dtype
from ._library import define, define_differentiable, refuse_double_backward
from ._norm_kernels import normalize, normalize_backward
from ._rows import as_matrix, autocasts_to_float32, empty_in_order, from_rows, memory_order

__all__ = ["layer_norm"]


def _forward_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    order = memory_order(x)
    rows = as_matrix(x, order).to(dtype).contiguous()
    mean = rows.mean(-1)
    y = rows - mean[:, None]
    rstd = torch.rsqrt(y.square().mean(-1) + eps)
    y = y * rstd[:, None]
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return from_rows(y.to(x.dtype), x, order), from_rows(mean, x, order), from_rows(rstd, x, order)


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = accumulation_dtype(x.dtype)
    order = memory_order(x)
    dy = as_matrix(dy, order).to(dtype).contiguous()
    rstd = as_matrix(rstd[..., None], order)
    normalized = (as_matrix(x, order).to(dtype).contiguous() - as_matrix(mean[..., None], order)) * rstd
    g = dy if weight is None else dy * weight.to(dtype)
    dx = rstd * (g - normalized * (g * normalized).mean(-1, keepdim=True) - g.mean(-1, keepdim=True))
    dweight = None if dweight_dtype is None else (dy * normalized).sum(0).to(dweight_dtype)
    dbias = None if dbias_dtype is None else dy.sum(0).to(dbias_dtype)
    return from_rows(dx.to(x.dtype), x, order), dweight, dbias


def _forward_kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    if x.dtype == torch.float64:
        return _forward_reference(x, weight, bias, eps)
    return normalize(x, weight, bias, eps, x.dtype, centered=True)


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    run = _backward_reference if x.dtype == torch.float64 else normalize_backward
    return run(dy, x, weight, mean, rstd, dweight_dtype, dbias_dtype)


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    order = memory_order(x)
    dtype = accumulation_dtype(x.dtype)
    mean, rstd = (empty_in_order(x, order, dtype, per_row=True) for _ in range(2))
    return empty_in_order(x, order, x.dtype), mean, rstd


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dweight, dbias = (
        None if dtype is None else x.new_empty(x.shape[-1:], dtype=dtype) for dtype in (dweight_dtype, dbias_dtype)
    )
    return empty_in_order(x, memory_order(x), x.dtype), dweight, dbias


_forward = define(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    kernel=_forward_kernel,
    reference=_forward_reference,
    fake=_forward_fake,
)
_backward = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, ScalarType? dweight_dtype,"
    " ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        ctx.dweight_dtype = weight.dtype if weight is not None and weight_grad else None
        ctx.dbias_dtype = bias.dtype if bias is not None and bias_grad else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("layer_norm")
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, ctx.dweight_dtype, ctx.dbias_dtype)
        return dx, dweight, dbias, None


def _differentiable(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _forward(x, weight, bias, eps)[0]


_layer_norm = define_differentiable(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", _differentiable
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, var the biased one.

    Computed in fp32 (fp64 for an fp64 x) and rounded once, as ``F.layer_norm``; autocast has the effect that it has
    there (on a GPU a half-precision x gives an fp32 result).

    Args:
        x: (..., H), any floating point dtype, any strides. Rows that a single stride reaches are not copied, transposed
            leading dimensions included, and the result has their memory order.
        weight: (H,) or None for no scale; its dtype may differ from x's.
        bias: (H,) or None for no shift; its dtype may differ from x's.
        eps: added to the variance.

    Returns:
        (..., H) in x's dtype, a new tensor. It is differentiable once in x, weight and bias.

    Raises:
        TypeError: x, weight or bias is not floating point.
        ValueError: weight's or bias's shape is not (H,), or the devices differ.
    """
    check_rows(x)
    if weight is not None:
        check_parameter("weight", weight, x)
    if bias is not None:
        check_parameter("bias", bias, x)
    if autocasts_to_float32(x, "layer_norm"):
        x = x.float()
    return _layer_norm(x, weight, bias, eps)
