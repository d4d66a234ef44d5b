"""Divergences between given distributions: of a student's logits from a teacher's, and PyTorch's ``kl_div``."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_floating, check_loss_options, check_same_device
from ._cross_entropy_tiles import FP16_GRADIENT_SCALE
from ._divergence_rows import Divergence, divergence_rows
from ._dtypes import accumulation_dtype
from ._formed_gradients import finish
from ._launch import launch
from ._library import define, define_differentiable, refuse_double_backward
from ._softmax_loss import RowLoss
from ._triton import tl, triton
from .linear_jsd import check_beta

__all__ = ["jsd", "kl_div"]

_JSD = "Tensor student_logits, Tensor teacher_logits, Tensor labels, int ignore_index, float beta, float inner"


def _make_jsd(use_kernel: bool) -> Any:
    def forward(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        beta: float,
        inner: float,
        need_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = student_logits.dtype
        token_loss = student_logits.new_zeros(len(labels), dtype=accumulation_dtype(dtype))
        gradient = torch.empty(student_logits.shape if need_gradient else (0,), dtype=dtype, device=labels.device)
        divergence_rows(
            student_logits,
            teacher_logits,
            labels,
            Divergence(ignore_index, beta, inner, 0.0, inner, 0.0),
            token_loss=token_loss,
            gradient=gradient if need_gradient else None,
            gradient_scale=FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0,
            use_kernel=use_kernel,
        )
        return token_loss, gradient

    return forward


def _fake_jsd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    shape = student_logits.shape if options[-1] else (0,)
    dtype = student_logits.dtype
    return student_logits.new_empty(labels.shape, dtype=accumulation_dtype(dtype)), student_logits.new_empty(shape)


_jsd_forward = define(
    f"jsd_forward({_JSD}, bool need_gradient) -> (Tensor, Tensor)",
    kernel=_make_jsd(True),
    reference=_make_jsd(False),
    fake=_fake_jsd,
)


class _JSDFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, *arguments: Any) -> Tensor:
        token_loss, gradient = _jsd_forward(student_logits, *arguments, True)
        ctx.save_for_backward(gradient)
        return token_loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("jsd")
        (gradient,) = ctx.saved_tensors
        half = gradient.dtype == torch.float16
        factor = upstream.new_full((), 1 / FP16_GRADIENT_SCALE) if half else None
        return (finish(gradient, gradient.dtype, factor, upstream), *(None,) * 5)


def _differentiable_jsd(student_logits: Tensor, *arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and student_logits.requires_grad:
        return _JSDFunction.apply(student_logits, *arguments)
    return _jsd_forward(student_logits, *arguments, False)[0]


_jsd = define_differentiable(f"jsd({_JSD}) -> Tensor", _differentiable_jsd)


def jsd(
    student_logits: Tensor,  # (*, V)
    teacher_logits: Tensor,  # (*, V)
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,  # (*)
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student from a teacher, given the logits of both.

    The definition is :func:`linear_jsd`'s. Log-probabilities are logits too: those of either model may be given in
    their place. The student's gradient is formed in the forward, in a tensor of its logits' shape and dtype; the
    teacher gets none.

    Args:
        student_logits, teacher_logits: (\\*, V), floating point, of any dtypes; contiguous along V, else copied.
        beta: in [0, 1]; 0 is the forward divergence ``KL(teacher || student)``, 1 the reverse one.
        temperature: both are divided by it; above 0.
        labels: (\\*); only tells by ``ignore_index`` which rows to leave out. None takes all.
        reduction: ``"mean"`` over the labels not ignored, ``"sum"`` or ``"none"``.
        num_items: divides the sum instead, for ``"mean"``.

    Returns:
        The loss in fp32 (float64 for float64 students), () or, for ``"none"``, the logits' shape without its last
        dimension.

    Raises:
        TypeError: for logits that are not floating point or labels that are not integers.
        ValueError: for shapes that don't match, an option outside its range, tensors on different devices.
        RuntimeError: in a double backward.
    """
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    check_beta(beta)
    check_loss_options(reduction, 0.0, 0.0, None, temperature)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have student_logits' shape {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    shape, n_classes = student_logits.shape[:-1], student_logits.shape[-1]
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.long, device=student_logits.device)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, class indices; got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the logits' shape without its last dimension, {tuple(shape)}; got {tuple(labels.shape)}"
        )
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the sum of the losses and goes with reduction='mean', got {reduction!r}")
    check_same_device(student_logits.device, teacher_logits=teacher_logits, labels=labels)
    spec = RowLoss.of(ignore_index, 1.0, None, temperature, 0.0, 0.0)
    flat = [each.reshape(-1, n_classes) for each in (student_logits, teacher_logits.detach())]
    flat = [each if each.stride(1) == 1 or n_classes == 1 else each.contiguous() for each in flat]
    token_loss = _jsd(*flat, labels.reshape(-1).long(), ignore_index, float(beta), spec.inner)
    if reduction == "none":
        return token_loss.view(shape)
    if reduction == "sum":
        return token_loss.sum()
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp(min=1)
    return token_loss.sum() / num_items


@triton.jit
def _kl_div_kernel(
    input_ptr,  # (R, V), rows input_stride apart
    input_stride,
    target_ptr,  # (R, V)
    target_stride,
    row_loss_ptr,  # (R,) out
    n_classes,
    LOG_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * input_stride
    target_ptr += row * target_stride
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_classes
        log_q = tl.load(input_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        if LOG_TARGET:
            term = tl.exp(target) * (target - log_q)
        else:  # 0 log 0 is 0
            term = tl.where(target == 0.0, 0.0, target * tl.log(target)) - target * log_q
        terms += tl.where(mask, term, 0.0)
    tl.store(row_loss_ptr + row, tl.sum(terms, 0))


@triton.jit
def _kl_div_backward_kernel(
    upstream_ptr,  # scalar
    target_ptr,  # (R, V), rows target_stride apart
    target_stride,
    gradient_ptr,  # (R, V) out, contiguous
    n_classes,
    LOG_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target_ptr += row * target_stride
    gradient_ptr += row * n_classes
    factor = tl.load(upstream_ptr).to(tl.float32)
    for start in range(0, n_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_classes
        target = tl.load(target_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        if LOG_TARGET:
            target = tl.exp(target)
        tl.store(gradient_ptr + columns, (-factor * target).to(gradient_ptr.dtype.element_ty), mask=mask)


def _block(n_classes: int) -> int:
    return min(max(triton.next_power_of_2(n_classes), 16), 8192)


def _kl_div_forward_kernel(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    if torch.float64 in (input.dtype, target.dtype) or not input.numel():
        return _kl_div_forward_reference(input, target, log_target)
    rows = input.new_empty(len(input), dtype=torch.float32)
    block = _block(input.shape[1])
    launch(
        _kl_div_kernel,
        (len(input), 1, 1),
        (input, input.stride(0), target, target.stride(0), rows, input.shape[1]),
        (log_target, block),
        num_warps=max(4, min(32, block // 512)),
    )
    return rows


def _kl_div_forward_reference(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    dtype = accumulation_dtype(input.dtype, target.dtype)
    terms = torch.nn.functional.kl_div(input.to(dtype), target.to(dtype), reduction="none", log_target=log_target)
    return terms.sum(1)


def _kl_div_backward_kernel_op(upstream: Tensor, target: Tensor, log_target: bool, dtype: torch.dtype) -> Tensor:
    if torch.float64 in (target.dtype, dtype) or not target.numel():
        return _kl_div_backward_reference(upstream, target, log_target, dtype)
    gradient = torch.empty(target.shape, dtype=dtype, device=target.device)
    block = _block(target.shape[1])
    launch(
        _kl_div_backward_kernel,
        (len(target), 1, 1),
        (upstream, target, target.stride(0), gradient, target.shape[1]),
        (log_target, block),
        num_warps=max(4, min(32, block // 512)),
    )
    return gradient


def _kl_div_backward_reference(upstream: Tensor, target: Tensor, log_target: bool, dtype: torch.dtype) -> Tensor:
    target = target.to(accumulation_dtype(target.dtype))
    return (-upstream * (target.exp() if log_target else target)).to(dtype)


_kl_div_forward = define(
    "kl_div_forward(Tensor input, Tensor target, bool log_target) -> Tensor",
    kernel=_kl_div_forward_kernel,
    reference=_kl_div_forward_reference,
    fake=lambda input, target, log_target: input.new_empty(
        input.shape[:1], dtype=accumulation_dtype(input.dtype, target.dtype)
    ),
)
_kl_div_backward = define(
    "kl_div_backward(Tensor upstream, Tensor target, bool log_target, ScalarType dtype) -> Tensor",
    kernel=_kl_div_backward_kernel_op,
    reference=_kl_div_backward_reference,
    fake=lambda upstream, target, log_target, dtype: target.new_empty(target.shape, dtype=dtype),
)


class _KLDivFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, log_target: bool) -> Tensor:
        ctx.save_for_backward(target)
        ctx.options = log_target, input.dtype
        return _kl_div_forward(input, target, log_target).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("kl_div")
        return _kl_div_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None


def _differentiable_kl_div(input: Tensor, target: Tensor, log_target: bool) -> Tensor:
    if torch.is_grad_enabled() and input.requires_grad:
        return _KLDivFunction.apply(input, target, log_target)
    return _kl_div_forward(input, target, log_target).sum()


_kl_div = define_differentiable(
    "kl_div(Tensor input, Tensor target, bool log_target) -> Tensor", _differentiable_kl_div
)


def kl_div(
    input: Tensor,  # (*, V)
    target: Tensor,  # (*, V)
    *,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """``KL(target || input)`` of given probabilities, as :func:`torch.nn.functional.kl_div` has it, in one pass.

    PyTorch makes a tensor of terms and sums it; here the sum needs a number a row and the backward one pass over the
    target. Sums are taken in fp32 (in float64 with float64 inputs).

    Args:
        input: (\\*, V) log-probabilities, floating point.
        target: (\\*, V) probabilities, or with ``log_target`` their logarithms. It gets no gradient.
        reduction: ``"batchmean"`` (divide the sum by the first dimension's size), ``"sum"``, ``"mean"`` (divide it by
            the number of elements, which is no divergence), or ``"none"``, which is PyTorch's function itself.
        log_target: see ``target``.

    Returns:
        The loss in fp32 (float64 with float64 inputs), or for ``"none"`` the terms in the inputs' shape and dtype.

    Raises:
        TypeError: for inputs that are not floating point.
        ValueError: for shapes that differ, an unknown reduction, tensors on different devices.
        RuntimeError: in a double backward.
    """
    check_floating(input=input, target=target)
    if reduction not in ("none", "batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be one of ('none', 'batchmean', 'sum', 'mean'), got {reduction!r}")
    if target.shape != input.shape or input.dim() == 0:
        raise ValueError(f"target must have input's shape {tuple(input.shape)}, got {tuple(target.shape)}")
    check_same_device(input.device, target=target)
    target = target.detach()
    if reduction == "none":
        return torch.nn.functional.kl_div(input, target, reduction="none", log_target=log_target)
    n_classes = input.shape[-1]
    flat = [each.reshape(-1, n_classes) for each in (input, target)]
    flat = [each if each.stride(1) == 1 or n_classes == 1 else each.contiguous() for each in flat]
    loss = _kl_div(*flat, log_target)
    divisor = {"sum": 1, "batchmean": input.shape[0], "mean": input.numel()}[reduction]
    return loss if divisor == 1 else loss / divisor
