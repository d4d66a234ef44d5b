"""Root mean square layer normalization (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_parameter, check_rows
from ._dtypes import accumulation_dtype
from ._library import define, define_differentiable, refuse_double_backward
from ._norm_kernels import normalize, normalize_backward
from ._rows import as_matrix, autocasts_to_float32, empty_in_order, from_rows, memory_order

__all__ = ["CASTINGS", "backward_reference", "check_arguments", "forward_reference", "result_dtype", "rms_norm"]

CASTINGS = ("llama", "gemma", "none")


def result_dtype(x_dtype: torch.dtype, weight: Tensor | None, casting: str) -> torch.dtype:
    if weight is None or casting != "llama":
        return x_dtype
    return torch.promote_types(x_dtype, weight.dtype)


def _scale(weight: Tensor, offset: float, casting: str, dtype: torch.dtype) -> Tensor:
    return (offset + weight).to(dtype) if casting == "llama" else offset + weight.to(dtype)


def forward_reference(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """y and the reciprocal root mean square of each row, both in x's memory order."""
    dtype = accumulation_dtype(x.dtype)
    order = memory_order(x)
    rows = as_matrix(x, order).to(dtype).contiguous()
    rstd = torch.rsqrt(rows.square().mean(-1) + eps)
    y = rows * rstd[:, None]
    if casting == "llama":
        y = y.to(x.dtype)
    if weight is not None:
        y = y * _scale(weight, offset, casting, dtype)
    y = y.to(result_dtype(x.dtype, weight, casting))
    return from_rows(y, x, order), from_rows(rstd, x, order)


def backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, dtotal added to it, and of the weight if asked for."""
    dtype = accumulation_dtype(x.dtype)
    order = memory_order(x)
    dy = as_matrix(dy, order).to(dtype).contiguous()
    rstd = as_matrix(rstd[..., None], order)
    normalized = as_matrix(x, order).to(dtype).contiguous() * rstd
    g = dy if weight is None else dy * _scale(weight, offset, casting, dtype)
    dx = rstd * (g - normalized * (g * normalized).mean(-1, keepdim=True))
    if dtotal is not None:
        dx = dx + as_matrix(dtotal, order).to(dtype)
    dweight = None
    if weight is not None and weight_grad:
        if casting == "llama":
            normalized = normalized.to(x.dtype)
        dweight = (dy * normalized).sum(0).to(weight.dtype)
    return from_rows(dx.to(x.dtype), x, order), dweight


def _forward_kernel(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return forward_reference(x, weight, eps, offset, casting)
    y, _, rstd = normalize(
        x, weight, None, eps, result_dtype(x.dtype, weight, casting), centered=False, offset=offset, casting=casting
    )
    return y, rstd


def _backward_kernel(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, casting: str, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    if x.dtype == torch.float64:
        return backward_reference(dy, x, weight, rstd, offset, casting, weight_grad)
    dweight_dtype = weight.dtype if weight is not None and weight_grad else None
    dx, dweight, _ = normalize_backward(dy, x, weight, None, rstd, dweight_dtype, None, offset=offset, casting=casting)
    return dx, dweight


def _forward_fake(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> tuple[Tensor, Tensor]:
    order = memory_order(x)
    y = empty_in_order(x, order, result_dtype(x.dtype, weight, casting))
    return y, empty_in_order(x, order, accumulation_dtype(x.dtype), per_row=True)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, casting: str, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    dweight = weight.new_empty(weight.shape) if weight is not None and weight_grad else None
    return empty_in_order(x, memory_order(x), x.dtype), dweight


_forward = define(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, float offset, str casting) -> (Tensor, Tensor)",
    kernel=_forward_kernel,
    reference=forward_reference,
    fake=_forward_fake,
)
_backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, str casting, bool weight_grad)"
    " -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=backward_reference,
    fake=_backward_fake,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> Tensor:
        y, rstd = _forward(x, weight, eps, offset, casting)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        ctx.casting = casting
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(dy, x, weight, rstd, ctx.offset, ctx.casting, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


def _differentiable(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, eps, offset, casting)
    return _forward(x, weight, eps, offset, casting)[0]


_rms_norm = define_differentiable(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, str casting) -> Tensor", _differentiable
)


def check_arguments(x: Tensor, weight: Tensor | None, casting: str) -> None:
    if casting not in CASTINGS:
        raise ValueError(f"casting must be one of {CASTINGS}, got {casting!r}")
    check_rows(x)
    if weight is not None:
        check_parameter("weight", weight, x)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Normalise the last dimension of x by its root mean square: ``x / sqrt(mean(x²) + eps) * (offset + weight)``.

    The mean and the reciprocal root are computed in fp32 (fp64 for an fp64 x). ``casting`` says where results are
    rounded, in which models differ; with ``n`` the normalised row in fp32:

    | casting | formula | dtype of the result |
    | --- | --- | --- |
    | ``llama`` | ``(offset + weight) * n.to(x.dtype)`` | promoted from x's and the weight's |
    | ``gemma`` | ``(n * (offset + weight.float())).to(x.dtype)`` | x's |
    | ``none`` | ``n * (offset + weight.float())``, as F.rms_norm | x's; fp32 where autocast gives F.rms_norm fp32 |

    Args:
        x: (..., H), any floating point dtype, any strides. Rows that a single stride reaches are not copied, transposed
            leading dimensions included, and the result has their memory order.
        weight: (H,), or None for no scale (then ``offset`` has no effect).
        eps: added to the mean square.
        offset: added to the weight; 1.0 for models that store the weight's difference from one.
        casting: ``"llama"``, ``"gemma"`` or ``"none"``.

    Returns:
        (..., H), a new tensor. It is differentiable once in x and weight.

    Raises:
        TypeError: x or weight is not floating point.
        ValueError: weight's shape is not (H,), the devices differ, or casting is unknown.
    """
    check_arguments(x, weight, casting)
    if casting == "none" and autocasts_to_float32(x, "rms_norm"):
        x = x.float()
    return _rms_norm(x, weight, eps, offset, casting)
