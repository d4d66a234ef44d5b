"""Residual addition and root mean square layer normalization (https://arxiv.org/abs/1910.07467) in one pass."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_floating, check_same_device
from ._dtypes import accumulation_dtype
from ._library import define, define_differentiable, refuse_double_backward
from ._norm_kernels import normalize, normalize_backward
from ._rows import as_matrix, autocasts_to_float32, empty_in_order, from_rows, memory_order
from .rms_norm import _forward as _norm_forward
from .rms_norm import backward_reference, check_arguments, forward_reference, result_dtype, rms_norm

__all__ = ["add_rms_norm", "rms_norm_and_residual"]


def _forward_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    order = memory_order(x)
    total = from_rows((as_matrix(x, order) + as_matrix(residual, order)).contiguous(), x, order)
    y, rstd = forward_reference(total, weight, eps, offset, casting)
    return y, total, rstd


def _backward_reference(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    return backward_reference(dy, total, weight, rstd, offset, casting, weight_grad, dtotal)


def _forward_kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if dtype == torch.float64:
        return _forward_reference(x, residual, weight, eps, offset, casting)
    total = empty_in_order(x, memory_order(x), dtype)
    y, _, rstd = normalize(
        x,
        weight,
        None,
        eps,
        result_dtype(dtype, weight, casting),
        centered=False,
        offset=offset,
        casting=casting,
        residual=residual,
        total=total,
    )
    return y, total, rstd


def _backward_kernel(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    if total.dtype == torch.float64:
        return backward_reference(dy, total, weight, rstd, offset, casting, weight_grad, dtotal)
    dweight_dtype = weight.dtype if weight is not None and weight_grad else None
    dx, dweight, _ = normalize_backward(
        dy, total, weight, None, rstd, dweight_dtype, None, offset=offset, casting=casting, dtotal=dtotal
    )
    return dx, dweight


def _forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    order = memory_order(x)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y = empty_in_order(x, order, result_dtype(dtype, weight, casting))
    total = empty_in_order(x, order, dtype)
    return y, total, empty_in_order(x, order, accumulation_dtype(dtype), per_row=True)


def _backward_fake(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    dweight = weight.new_empty(weight.shape) if weight is not None and weight_grad else None
    return empty_in_order(total, memory_order(total), total.dtype), dweight


_forward = define(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str casting)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_forward_kernel,
    reference=_forward_reference,
    fake=_forward_fake,
)
_backward = define(
    "add_rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor rstd, float offset,"
    " str casting, bool weight_grad) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = _forward(x, residual, weight, eps, offset, casting)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)  # an output that nothing used costs no zeros
        ctx.offset = offset
        ctx.casting = casting
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("add_rms_norm")
        dx, dweight = dtotal, None
        if dy is not None:
            total, weight, rstd = ctx.saved_tensors
            dx, dweight = _backward(dy, dtotal, total, weight, rstd, ctx.offset, ctx.casting, ctx.needs_input_grad[2])
        # One tensor for both, as the backward of + gives: autograd sees the second owner and adds to neither in place,
        # and rounds for an input whose dtype is not total's.
        return dx, dx, dweight, None, None, None


def _differentiable(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _AddRMSNorm.apply(x, residual, weight, eps, offset, casting)
    return _forward(x, residual, weight, eps, offset, casting)[:2]


_add_rms_norm = define_differentiable(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str casting) -> (Tensor, Tensor)",
    _differentiable,
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "llama",
) -> tuple[Tensor, Tensor]:
    """``total = x + residual`` and its :func:`rms_norm`, as a decoder layer has them between two of its blocks.

    The results are those of the two operations by themselves: the sum is rounded to its dtype, and the norm reads the
    rounded sum. In the backward the gradients that reach total directly and through the norm are added in fp32 (fp64)
    and rounded once.

    Args:
        x: (..., H), any floating point dtype, any strides. Both results have its memory order.
        residual: of x's shape; its dtype and strides may differ from x's. Rows that lie in memory in another order than
            x's are copied.
        weight: (H,), or None for no scale (then ``offset`` has no effect).
        eps: added to the mean square.
        offset: added to the weight; 1.0 for models that store the weight's difference from one.
        casting: ``"llama"``, ``"gemma"`` or ``"none"``: where results are rounded, see :func:`rms_norm`.

    Returns:
        y and total, (..., H) both: total in the dtype promoted from x's and residual's, y in the one that
        :func:`rms_norm` gives for it. They are differentiable once in x, residual and weight; one tensor is the
        gradient of both x and residual where these have one dtype.

    Raises:
        TypeError: x, residual or weight is not floating point.
        ValueError: residual's shape is not x's (it is not broadcast), weight's is not (H,), the devices differ, or
            casting is unknown.
    """
    check_arguments(x, weight, casting)
    check_floating(residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_same_device(x.device, residual=residual)
    if casting == "none" and autocasts_to_float32(x, "rms_norm"):
        total = x + residual
        return rms_norm(total, weight, eps, offset=offset, casting=casting), total
    return _add_rms_norm(x, residual, weight, eps, offset, casting)


class _RMSNormAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        y, rstd = _norm_forward(x, weight, eps, offset, casting)
        ctx.save_for_backward(x, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.offset = offset
        ctx.casting = casting
        return y, x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("rms_norm_and_residual")
        dx, dweight = dresidual, None
        if dy is not None:
            x, weight, rstd = ctx.saved_tensors
            dx, dweight = _backward(dy, dresidual, x, weight, rstd, ctx.offset, ctx.casting, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


def rms_norm_and_residual(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` of x, and x again for the residual connection around what follows the norm.

    In the forward nothing is added or copied. In the backward the gradients that reach x through the norm and through
    the connection are added inside the norm's kernel, in fp32 (fp64) and rounded once, and not by a pass of their own.

    Args:
        x, weight, eps, offset, casting: as for :func:`rms_norm`.

    Returns:
        y and residual, (..., H) both: residual is x's memory under another name. They are differentiable once in x and
        weight.

    Raises:
        TypeError, ValueError: as :func:`rms_norm`.
    """
    check_arguments(x, weight, casting)
    recorded = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    # A compiler joins the addition with what stands around it by itself.
    if not recorded or torch.compiler.is_compiling() or (casting == "none" and autocasts_to_float32(x, "rms_norm")):
        return rms_norm(x, weight, eps, offset=offset, casting=casting), x
    return _RMSNormAndResidual.apply(x, weight, eps, offset, casting)
