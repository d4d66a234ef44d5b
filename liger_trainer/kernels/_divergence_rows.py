"""The row mathematics of divergences between a student's and a teacher's distribution, over logits.

With the softmaxes ``s`` and ``t`` of a row of student's and teacher's logits, each transformed as in
:mod:`._softmax_loss`, and the mixture ``m = (1 - beta) s + beta t``:

.. code-block:: text

    beta = 0   D = KL(t || s)                                   dD/dz = s - t
    beta = 1   D = KL(s || t)                                   dD/dz = s (log s - log t - D)
    else       D = beta KL(t || m) + (1 - beta) KL(s || m)      dD/dz = (1 - beta) s (log s - log m - KL(s || m))

where z are the student's transformed logits: the generalised Jensen-Shannon divergence of Agarwal et al., 2024,
https://arxiv.org/abs/2306.13649, eq. 1, and the two ends that it is given there. ``log m`` comes from the ratio of t to
s, so that nearly equal distributions lose no digits to its cancelling against ``log s``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype
from ._launch import launch
from ._softmax_loss import _statistics_of_block, _transform
from ._triton import tl, triton

__all__ = ["Divergence", "divergence_rows"]

_LIMIT = 100.0  # of the ratio's logarithm, in units of ln(2): beyond, the smaller probability is nothing in the mixture


class Divergence(NamedTuple):
    """The constants of the row formula above; ``outer`` is 0 without a soft-cap."""

    ignore_index: int
    beta: float
    student_inner: float
    student_outer: float
    teacher_inner: float
    teacher_outer: float


@triton.jit
def _log_sum_exp2(
    logits_ptr,
    n_classes,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """The log-sum-exp of a row in units of ``ln(2)``, and with ENTROPY the mean of its logits under its softmax."""
    n_whole = n_classes - n_classes % BLOCK
    maximum = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK // LANE,), tl.float32)
    moment = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in range(0, n_whole, BLOCK):
        maximum, total, _weighted, moment, _squares, _best, _column = _statistics_of_block(
            maximum, total, 0.0, moment, 0.0, 0.0, 0, logits_ptr, None, start, n_classes, inner, outer, SOFTCAP, False,
            ENTROPY, False, False, False, "evict_last", BLOCK, LANE,
        )  # fmt: skip
    if n_whole < n_classes:
        maximum, total, _weighted, moment, _squares, _best, _column = _statistics_of_block(
            maximum, total, 0.0, moment, 0.0, 0.0, 0, logits_ptr, None, n_whole, n_classes, inner, outer, SOFTCAP,
            False, ENTROPY, False, False, True, "evict_last", BLOCK, LANE,
        )  # fmt: skip
    row_maximum = tl.max(maximum, 0)
    rescale = tl.exp2(maximum - tl.where(row_maximum == float("-inf"), 0.0, row_maximum))
    row_total = tl.sum(total * rescale, 0)
    return row_maximum + tl.log2(row_total), tl.sum(moment * rescale, 0) / row_total


@triton.jit
def _log_probabilities(logits_ptr, columns, mask, inner, outer, lse, SOFTCAP: tl.constexpr):
    """A block's log-probabilities in units of ``ln(2)``, -inf outside the row, and the transform's slope."""
    z, slope = _transform(tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32), inner, outer, SOFTCAP)
    return tl.where(mask, z - lse, float("-inf")), slope


@triton.jit
def _log_mixture_over_student(log_s, log_t, beta, LIMIT: tl.constexpr):
    """``log2(m / s)``, and ``log2(t / s)`` as far as it matters there."""
    ratio = tl.maximum(log_t, -1000.0) - tl.maximum(log_s, -1000.0)
    ratio = tl.minimum(tl.maximum(ratio, -LIMIT), LIMIT)
    return tl.log2((1.0 - beta) + beta * tl.exp2(ratio)), ratio


@triton.jit
def _divergence_kernel(
    student_ptr,  # (R, V), rows student_stride apart
    student_stride,
    teacher_ptr,  # (R, V)
    teacher_stride,
    gradient_ptr,  # (R, V) or None; may be student_ptr
    gradient_stride,
    labels_ptr,  # (N,)
    rows_ptr,  # (R,) the row of the (N,) arrays that a row of logits stands for, or None where they are the same
    token_weights_ptr,  # (N,) or None
    token_loss_ptr,  # (N,) out
    entropy_ptr,  # (N,) out, of the student, or None
    scale_ptr,  # scalar, or None for 1
    n_classes,
    ignore_index,
    beta,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    gradient_scale,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STUDENT_LANE: tl.constexpr,
    TEACHER_LANE: tl.constexpr,
):
    tile_row = tl.program_id(0).to(tl.int64)
    row = tile_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr + tile_row)
    student_ptr += tile_row * student_stride
    teacher_ptr += tile_row * teacher_stride
    if gradient_ptr is not None:
        gradient_ptr += tile_row * gradient_stride

    if tl.load(labels_ptr + row) == ignore_index:  # whose loss holds its zero already
        if gradient_ptr is not None:
            zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
            for start in range(0, n_classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(gradient_ptr + columns, zeros, mask=columns < n_classes)
        return

    student_lse, student_mean = _log_sum_exp2(
        student_ptr, n_classes, student_inner, student_outer, STUDENT_SOFTCAP, entropy_ptr is not None, BLOCK,
        STUDENT_LANE,
    )  # fmt: skip
    teacher_lse, _mean = _log_sum_exp2(
        teacher_ptr, n_classes, teacher_inner, teacher_outer, TEACHER_SOFTCAP, False, BLOCK, TEACHER_LANE
    )
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, 0.6931471805599453 * (student_lse - student_mean))
    of_student = tl.zeros((BLOCK,), tl.float32)  # terms of the divergence of s
    of_teacher = tl.zeros((BLOCK,), tl.float32)  # and of t
    for start in range(0, n_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_classes
        log_s, _slope = _log_probabilities(
            student_ptr, columns, mask, student_inner, student_outer, student_lse, STUDENT_SOFTCAP
        )
        log_t, _slope = _log_probabilities(
            teacher_ptr, columns, mask, teacher_inner, teacher_outer, teacher_lse, TEACHER_SOFTCAP
        )
        s = tl.exp2(log_s)
        t = tl.exp2(log_t)
        if FORWARD:
            of_teacher += tl.where(t == 0.0, 0.0, t * (log_t - log_s))
        elif REVERSE:
            of_student += tl.where(s == 0.0, 0.0, s * (log_s - log_t))
        else:
            log_m, ratio = _log_mixture_over_student(log_s, log_t, beta, LIMIT)
            of_student -= s * log_m
            of_teacher += t * (ratio - log_m)
    student_divergence = tl.sum(of_student, 0)
    if FORWARD:
        divergence = tl.sum(of_teacher, 0)
    elif REVERSE:
        divergence = student_divergence
    else:
        divergence = beta * tl.sum(of_teacher, 0) + (1.0 - beta) * student_divergence
    weight = 1.0
    if token_weights_ptr is not None:
        weight = tl.load(token_weights_ptr + row).to(tl.float32)
    tl.store(token_loss_ptr + row, 0.6931471805599453 * weight * divergence)

    if gradient_ptr is not None:
        factor = gradient_scale * weight
        if scale_ptr is not None:
            factor *= tl.load(scale_ptr).to(tl.float32)
        if not FORWARD:
            factor *= 0.6931471805599453
            if not REVERSE:
                factor *= 1.0 - beta
        factor *= 0.6931471805599453  # the slope is times log2(e)
        for start in range(0, n_classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < n_classes
            log_s, slope = _log_probabilities(
                student_ptr, columns, mask, student_inner, student_outer, student_lse, STUDENT_SOFTCAP
            )
            log_t, _slope = _log_probabilities(
                teacher_ptr, columns, mask, teacher_inner, teacher_outer, teacher_lse, TEACHER_SOFTCAP
            )
            s = tl.exp2(log_s)
            if FORWARD:
                gradient = s - tl.exp2(log_t)
            elif REVERSE:
                gradient = tl.where(s == 0.0, 0.0, s * (log_s - log_t - student_divergence))
            else:
                log_m, _ratio = _log_mixture_over_student(log_s, log_t, beta, LIMIT)
                gradient = s * (-log_m - student_divergence)
            gradient *= factor * slope
            tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


def _transformed(logits: Tensor, inner: float, outer: float) -> tuple[Tensor, Tensor | float]:
    """z and dz/dl of logits l, in the dtype that is accumulated in."""
    z = logits.to(accumulation_dtype(logits.dtype)) * inner
    if not outer:
        return z, inner
    tanh = torch.tanh(z)
    return outer * tanh, (1 - tanh.square()) * (inner * outer)


def _divergence_reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    spec: Divergence,
    *,
    rows: Tensor | None,
    token_weights: Tensor | None,
    token_loss: Tensor,
    entropy: Tensor | None,
    gradient: Tensor | None,
    scale: Tensor | None,
    gradient_scale: float,
) -> None:
    index = slice(None) if rows is None else rows
    valid = labels[index] != spec.ignore_index
    beta = spec.beta
    z, slope = _transformed(student, spec.student_inner, spec.student_outer)
    log_s = z.log_softmax(1)
    log_t = _transformed(teacher, spec.teacher_inner, spec.teacher_outer)[0].log_softmax(1).to(log_s.dtype)
    s, t = log_s.exp(), log_t.exp()
    if entropy is not None:
        entropy[index] = torch.where(valid, -(s * log_s.masked_fill(s == 0, 0)).sum(1), 0)
    if beta == 0:
        divergence = (t * (log_t - log_s)).masked_fill_(t == 0, 0).sum(1)
        dz = s - t
    elif beta == 1:
        terms = (s * (log_s - log_t)).masked_fill_(s == 0, 0)
        divergence = terms.sum(1)
        dz = terms - s * divergence.unsqueeze(1)
    else:
        lowest, limit = -1000 * math.log(2), _LIMIT * math.log(2)
        ratio = log_t.clamp(min=lowest).sub_(log_s.clamp(min=lowest)).clamp_(-limit, limit)
        log_m = torch.log((1 - beta) + beta * ratio.exp())
        of_student = -(s * log_m).sum(1)
        divergence = beta * (t * (ratio - log_m)).sum(1) + (1 - beta) * of_student
        dz = s.mul_(log_m.neg_().sub_(of_student.unsqueeze(1))).mul_(1 - beta)
    weight = torch.ones((), dtype=z.dtype, device=z.device)
    if token_weights is not None:
        weight = token_weights[index].to(z.dtype)
    token_loss[index] = torch.where(valid, weight * divergence, 0)
    if gradient is None:
        return
    factor = gradient_scale * weight if scale is None else gradient_scale * weight * scale
    dz.mul_(factor.expand(len(valid)).unsqueeze(1)).mul_(slope)
    gradient.copy_(dz.masked_fill_(~valid.unsqueeze(1), 0))


def divergence_rows(
    student: Tensor,  # (R, V), unit stride along V
    teacher: Tensor,  # (R, V), unit stride along V
    labels: Tensor,  # (N,) int64
    spec: Divergence,
    *,
    rows: Tensor | None = None,  # (R,) int64
    token_weights: Tensor | None = None,  # (N,)
    token_loss: Tensor,  # (N,) out
    entropy: Tensor | None = None,  # (N,) out
    gradient: Tensor | None = None,  # (R, V) out; may be student
    scale: Tensor | None = None,  # ()
    gradient_scale: float = 1.0,
    use_kernel: bool,
) -> None:
    """Write each row's divergence times its weight and, where buffers are given for them, the student's entropy and
    gradient.

    Rows whose label is ``ignore_index`` leave loss and entropy as they are and get a zero gradient. The gradient is
    multiplied by ``gradient_scale`` and ``scale``.
    """
    if student.numel() == 0:
        return
    if not use_kernel or torch.float64 in (student.dtype, teacher.dtype):
        _divergence_reference(
            student,
            teacher,
            labels,
            spec,
            rows=rows,
            token_weights=token_weights,
            token_loss=token_loss,
            entropy=entropy,
            gradient=gradient,
            scale=scale,
            gradient_scale=gradient_scale,
        )
        return
    n_classes = student.shape[1]
    block = min(max(triton.next_power_of_2(n_classes), 16), 8192)
    launch(
        _divergence_kernel,
        (student.shape[0], 1, 1),
        (
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            gradient,
            0 if gradient is None else gradient.stride(0),
            labels.contiguous(),
            rows,
            None if token_weights is None else token_weights.contiguous(),
            token_loss,
            entropy,
            scale,
            n_classes,
            *spec,
            gradient_scale,
        ),
        (
            spec.student_outer != 0,
            spec.teacher_outer != 0,
            spec.beta == 0,
            spec.beta == 1,
            _LIMIT,
            block,
            16 // student.itemsize,
            16 // teacher.itemsize,
        ),
        num_warps=max(4, min(32, block // 512)),
    )
