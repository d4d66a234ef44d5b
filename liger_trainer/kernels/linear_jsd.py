"""Divergence between a student's and a teacher's next tokens without either's logits, for distillation.

Both models' logits exist a tile of rows at a time, side by side. As the loss is a known reduction, the student's
gradient is formed in the forward in the place of its logits, so that there are four matrix products in all: one for the
teacher, three for the student. Rows whose label is ignored take part in none of them.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_head, check_head_labels, check_loss_options, check_low_rank, check_same_device
from ._cross_entropy_tiles import FP16_GRADIENT_SCALE
from ._divergence_rows import Divergence, divergence_rows
from ._dtypes import accumulation_dtype, products_dtype
from ._formed_gradients import finish
from ._library import define, define_differentiable, refuse_double_backward
from ._products import (
    NEED_SCHEMA,
    LowRank,
    Need,
    any_requires_grad,
    empty_gradients,
    flat_low_rank,
    gradient_dtypes,
    head_product,
)
from ._reduction import loss_scale, row_weights
from ._softmax_loss import RowLoss
from ._tiles import partition_rows, run_tiles, without_autocast

__all__ = ["JSDOutput", "check_beta", "linear_jsd"]


class JSDOutput(NamedTuple):
    """What :func:`linear_jsd` returns when more than the loss is asked for, else None; only ``loss`` has a gradient."""

    loss: Tensor
    token_loss: Tensor | None = None  # hidden's shape without its last dimension, times the tokens' weights
    student_entropy: Tensor | None = None  # the same shape: of the tempered softmax, in nats


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")


class _Teacher:
    """Makes the teacher's logits of a tile of rows, and what becomes of the two models' logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: LowRank | None,
        compute_dtype: torch.dtype,
        options: dict[str, Any],
    ) -> None:
        self.hidden, self.weight = hidden, weight.to(compute_dtype)
        self.bias = None if bias is None else bias.to(compute_dtype)
        self.low_rank = None if low_rank is None else low_rank._replace(weight=low_rank.weight.to(compute_dtype))
        self.buffer: Tensor | None = None
        self.options = options

    def on_tile(self, student: Tensor, rows: Tensor | None, gradient: Tensor | None) -> None:
        hidden = self.hidden if rows is None else self.hidden.index_select(0, rows)
        if self.buffer is None:  # the first tile is the longest
            self.buffer = torch.empty(student.shape, dtype=self.weight.dtype, device=student.device)
        teacher = self.buffer[: len(student)]
        low_rank = None if self.low_rank is None else self.low_rank.rows(rows, self.weight.dtype)
        head_product(hidden.to(self.weight.dtype), self.weight, self.bias, low_rank, teacher)
        divergence_rows(student, teacher, rows=rows, gradient=gradient, **self.options)


def _make_forward(use_kernel: bool) -> Any:
    def forward(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        student_low_rank_hidden: Tensor | None,
        student_low_rank_weight: Tensor | None,
        teacher_low_rank_hidden: Tensor | None,
        teacher_low_rank_weight: Tensor | None,
        token_weights: Tensor | None,
        num_items: Tensor | None,
        divisor: float | None,
        reduction: str,
        ignore_index: int,
        beta: float,
        student_inner: float,
        student_outer: float,
        teacher_inner: float,
        teacher_outer: float,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        tile_bytes: int | None,
        max_valid: int | None,
        entropy: bool,
        *needs: Any,  # as NEED_SCHEMA has them
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(student_dtype)
        rows, n_valid = partition_rows(labels, ignore_index, max_valid, use_kernel)
        token_loss = torch.zeros(len(labels), dtype=dtype, device=student_hidden.device)
        student_entropy = torch.zeros(len(labels) if entropy else 0, dtype=dtype, device=student_hidden.device)
        scale = loss_scale(
            labels,
            mean=reduction == "mean",
            weights=row_weights(labels, ignore_index, token_weights, None, dtype),
            divisor_tensor=num_items,
            divisor=divisor,
            ignore_index=ignore_index,
            n_processed=n_valid,
            dtype=dtype,
            use_kernel=use_kernel,
        )
        half = student_dtype == torch.float16
        options = {
            "labels": labels,
            "spec": Divergence(ignore_index, beta, student_inner, student_outer, teacher_inner, teacher_outer),
            "token_weights": token_weights,
            "token_loss": token_loss,
            "entropy": student_entropy if entropy else None,
            "scale": None if half else scale,
            "gradient_scale": FP16_GRADIENT_SCALE if half else 1.0,
            "use_kernel": use_kernel,
        }
        with without_autocast(student_hidden):
            of_teacher = LowRank.of(teacher_low_rank_hidden, teacher_low_rank_weight)
            teacher = _Teacher(teacher_hidden, teacher_weight, teacher_bias, of_teacher, teacher_dtype, options)
            gradients = run_tiles(
                student_hidden,
                student_weight,
                student_bias,
                LowRank.of(student_low_rank_hidden, student_low_rank_weight),
                teacher.on_tile,
                rows=rows,
                n_valid=n_valid,
                compute_dtype=student_dtype,
                weight_gradient_dtype=needs[-1],
                tile_bytes=tile_bytes,
                need=Need(*needs[:-1]),
                n_heads=2,
            )
        if reduction == "none":
            loss = torch.where(scale.isnan(), torch.nan, token_loss)
        else:
            loss = token_loss.sum() * scale
        return loss, token_loss, student_entropy, scale, *gradients.in_order()

    return forward


def _fake_forward(student_hidden: Tensor, student_weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options = _Options(*arguments[:-6])
    low_rank = options.student_low_rank_hidden, options.student_low_rank_weight
    dtype = accumulation_dtype(options.student_dtype)
    rows = student_hidden.new_empty(options.labels.shape, dtype=dtype)
    scalar = rows.new_empty(())
    return (
        torch.empty_like(rows if options.reduction == "none" else scalar),
        rows,
        rows.new_empty(rows.shape if options.entropy else (0,)),
        scalar,
        *empty_gradients(
            student_hidden, student_weight, *low_rank, options.student_dtype, arguments[-6:-1], arguments[-1]
        ),
    )


class _Options(NamedTuple):
    """The op's arguments behind its first two."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_low_rank_hidden: Tensor | None
    student_low_rank_weight: Tensor | None
    teacher_low_rank_hidden: Tensor | None
    teacher_low_rank_weight: Tensor | None
    token_weights: Tensor | None
    num_items: Tensor | None
    divisor: float | None
    reduction: str
    ignore_index: int
    beta: float
    student_inner: float
    student_outer: float
    teacher_inner: float
    teacher_outer: float
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    tile_bytes: int | None
    max_valid: int | None
    entropy: bool


_N_TENSORS = 11  # of _Options' fields

_ARGUMENTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor labels, "
    "Tensor? student_bias, Tensor? teacher_bias, Tensor? student_low_rank_hidden, Tensor? student_low_rank_weight, "
    "Tensor? teacher_low_rank_hidden, Tensor? teacher_low_rank_weight, "
    "Tensor? token_weights, Tensor? num_items, float? divisor, "
    "str reduction, int ignore_index, float beta, float student_inner, float student_outer, float teacher_inner, "
    "float teacher_outer, ScalarType student_dtype, ScalarType teacher_dtype, int? tile_bytes, SymInt? max_valid, "
    "bool entropy"
)
_forward = define(
    f"linear_jsd_forward({_ARGUMENTS}, {NEED_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_make_forward(True),
    reference=_make_forward(False),
    fake=_fake_forward,
    tags=(torch.Tag.cudagraph_unsafe,),  # the host may wait for the number of labels
)


class _LinearJSD(torch.autograd.Function):
    """Gradients of a reduced loss wait, formed, for the one factor that is still to come."""

    @staticmethod
    def forward(ctx: Any, student_hidden: Tensor, student_weight: Tensor, *arguments: Any) -> Any:
        options = _Options(*arguments)
        given = ctx.needs_input_grad
        ctx.need = Need(given[0], given[1], given[5], given[7], given[8])
        ctx.per_row = options.reduction == "none"
        # The sum over rows in the weight's gradient can't take an upstream gradient a row later: there all is computed
        # again in the backward, the upstream gradient being the tokens' weights.
        ctx.again = ctx.per_row and ctx.need.sums_rows
        ctx.dtypes = gradient_dtypes(
            student_hidden,
            student_weight,
            options.student_bias,
            options.student_low_rank_hidden,
            options.student_low_rank_weight,
        )
        half = options.student_dtype == torch.float16  # rounded only after its factor
        ctx.weight_dtype = torch.float32 if half else ctx.dtypes[1]
        needs = (*(Need() if ctx.again else ctx.need), ctx.weight_dtype)
        loss, token_loss, entropy, scale, *gradients = _forward(student_hidden, student_weight, *options, *needs)
        ctx.mark_non_differentiable(token_loss, entropy)
        ctx.set_materialize_grads(False)
        if ctx.again:
            ctx.save_for_backward(student_hidden, student_weight, *options[:_N_TENSORS])
        else:
            ctx.save_for_backward(scale, *gradients)
        tensors = dict.fromkeys(_Options._fields[:_N_TENSORS])
        ctx.options = options._replace(**tensors)  # type: ignore[arg-type]
        return loss, token_loss, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_jsd")
        options: _Options = ctx.options
        rest = (None,) * len(options)
        if upstream is None:
            return (None, None, *rest)
        half = options.student_dtype == torch.float16
        factor = row_scale = None
        if ctx.again:
            student_hidden, student_weight, *tensors = ctx.saved_tensors
            again = options._replace(**dict(zip(_Options._fields, tensors)))
            weights = upstream if again.token_weights is None else upstream * again.token_weights
            if half:  # what may be as small as 1/N waits outside
                factor = weights.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
                weights, factor = weights / factor, factor / FP16_GRADIENT_SCALE
            again = again._replace(token_weights=weights, num_items=None, divisor=None, reduction="sum", entropy=False)
            gradients = _forward(student_hidden, student_weight, *again, *ctx.need, ctx.weight_dtype)[4:]
        else:
            scale, *gradients = ctx.saved_tensors
            factor = None if ctx.per_row else upstream
            row_scale = upstream if ctx.per_row else None
            if half:
                factor = (1 if factor is None else factor) * scale / FP16_GRADIENT_SCALE
        finished = [
            finish(gradient, dtype, factor, row_scale) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.need)
        ]
        hidden, weight, bias, *low_rank = finished
        return (hidden, weight, None, None, None, bias, None, *low_rank, *rest[7:])


def _differentiable(student_hidden: Tensor, student_weight: Tensor, *arguments: Any) -> Any:
    options = _Options(*arguments)
    low_rank = options.student_low_rank_hidden, options.student_low_rank_weight
    if any_requires_grad(student_hidden, student_weight, options.student_bias, *low_rank):
        return _LinearJSD.apply(student_hidden, student_weight, *arguments)
    return _forward(student_hidden, student_weight, *arguments, *Need(), student_weight.dtype)[:3]


_op = define_differentiable(f"linear_jsd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _differentiable)


def linear_jsd(
    student_hidden: Tensor,  # (*, Hs)
    student_weight: Tensor,  # (Vs, Hs)
    teacher_hidden: Tensor,  # (*, Ht)
    teacher_weight: Tensor,  # (Vt, Ht)
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,  # (*)
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    token_weights: Tensor | None = None,  # (*)
    student_bias: Tensor | None = None,  # (Vs,)
    teacher_bias: Tensor | None = None,  # (Vt,)
    student_low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (Vs, r)
    teacher_low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (Vt, r)
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    tile_bytes: int | None = None,
    max_valid: int | None = None,
    compute_dtype: torch.dtype | None = None,
    outputs: Collection[str] = (),
) -> Tensor | JSDOutput:
    """Generalised Jensen-Shannon divergence of a student from a teacher, without either's logits.

    With ``s`` and ``t`` the softmaxes of student's and teacher's logits (each scaled and soft-capped as in
    :func:`linear_cross_entropy`, then divided by ``temperature``) and ``m = (1 - beta) s + beta t``, a token's loss is
    ``beta KL(t || m) + (1 - beta) KL(s || m)``, for ``beta=0`` the forward divergence ``KL(t || s)``, for ``beta=1``
    the reverse one, ``KL(s || t)`` (Agarwal et al., 2024, https://arxiv.org/abs/2306.13649). So have it TRL's
    ``GKDTrainer.generalized_jsd_loss`` and Liger-Kernel's ``LigerFusedLinearJSD``; towards the ends the divergence
    vanishes as ``beta`` or ``1 - beta`` does, at the ends it does not. Liger-Kernel's ``LigerFusedLinearJSDLoss`` has
    had versions with the mixture's weights exchanged, see :mod:`liger_trainer.alignment_losses.jsd`. No factor
    of ``temperature**2`` is applied. Gradients flow to the student alone.

    Memory besides inputs and gradients: two tiles that together take ``tile_bytes``, and the fp32 buffer of
    :func:`linear_cross_entropy` for the weight's gradient.

    Args:
        student_hidden: (\\*, Hs), floating point.
        student_weight: (Vs, Hs), of the same dtype outside of autocast.
        teacher_hidden: (\\*, Ht); the teacher's tensors may have a dtype of their own.
        teacher_weight: (Vt, Ht). Where Vs and Vt differ, one head being padded to a round number, the rows beyond the
            smaller of them take no part in either softmax.
        beta: in [0, 1].
        temperature: above 0.
        labels: (\\*), already shifted; only tells by ``ignore_index`` which rows to leave out. None takes all.
        reduction: ``"mean"`` over the labels not ignored (over their weights, with ``token_weights``), ``"sum"``, or
            ``"none"`` for hidden's shape without its last dimension, which takes any upstream gradient at the price of
            two more products where the weight wants one.
        num_items: divides the sum instead, for ``"mean"`` over gradient-accumulation steps; a number or a 0-dim tensor.
        token_weights: (\\*) factors of the tokens' losses; no gradient flows to them.
        student_bias, teacher_bias: (Vs,) and (Vt,), or None.
        student_low_rank, teacher_low_rank: a further term of the models' logits, as in :func:`linear_cross_entropy`.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: of the models' logits.
        tile_bytes: bound of the two tiles of logits together, in bytes; None chooses as :func:`linear_cross_entropy`.
        max_valid: an upper bound, known to the host, of the number of labels that are not ignored. With a bound that is
            too small the loss is NaN.
        compute_dtype: dtype of both models' products, where it is not to follow from autocast and the inputs.
        outputs: names among ``token_loss`` and ``student_entropy`` to return besides the loss, without gradient.

    Returns:
        The loss in fp32 (float64 for float64 students), () or hidden's shape without its last dimension; or
        :class:`JSDOutput` when ``outputs`` names something.

    Raises:
        TypeError: for a dtype that is not as above.
        ValueError: for shapes that don't match, an option outside its range, tensors on different devices.
        RuntimeError: in a double backward.
    """
    check_beta(beta)
    check_loss_options(reduction, 0.0, 0.0, student_softcap, temperature)
    check_loss_options(reduction, 0.0, 0.0, teacher_softcap, temperature)
    check_head(student_hidden, student_weight, student_bias, "student_")
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    check_low_rank(student_low_rank, student_hidden, student_weight, "student_low_rank")
    check_low_rank(teacher_low_rank, teacher_hidden, teacher_weight, "teacher_low_rank")
    shape, device = student_hidden.shape[:-1], student_hidden.device
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden must have student_hidden's shape but for its last dimension, {tuple(shape)}; "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.long, device=device)
        max_valid = labels.numel()
    check_head_labels(student_hidden, labels)
    if token_weights is not None and token_weights.shape != shape:
        raise ValueError(f"token_weights must have shape {tuple(shape)}, got {tuple(token_weights.shape)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the sum of the losses and goes with reduction='mean', got {reduction!r}")
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"tile_bytes must be above 0, got {tile_bytes}")
    if isinstance(num_items, (int, float)) and torch.compiler.is_compiling():
        num_items = torch.ones((), dtype=torch.float32, device=device) * num_items  # a number would be a new graph's
    divisor = None if num_items is None or isinstance(num_items, Tensor) else float(num_items)
    if divisor is not None and not divisor > 0:
        raise ValueError(f"num_items must be above 0, got {num_items}")
    items = num_items if isinstance(num_items, Tensor) else None
    check_same_device(
        device, labels=labels, teacher_hidden=teacher_hidden, token_weights=token_weights, num_items=items
    )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        n_classes = min(student_weight.shape[0], teacher_weight.shape[0])
        student_weight, teacher_weight = student_weight[:n_classes], teacher_weight[:n_classes]
        student_bias = None if student_bias is None else student_bias[:n_classes]
        teacher_bias = None if teacher_bias is None else teacher_bias[:n_classes]
        student_low_rank = None if student_low_rank is None else (student_low_rank[0], student_low_rank[1][:n_classes])
        teacher_low_rank = None if teacher_low_rank is None else (teacher_low_rank[0], teacher_low_rank[1][:n_classes])
    student_spec = RowLoss.of(ignore_index, student_logit_scale, student_softcap, temperature, 0.0, 0.0)
    teacher_spec = RowLoss.of(ignore_index, teacher_logit_scale, teacher_softcap, temperature, 0.0, 0.0)
    unknown = set(outputs) - {"token_loss", "student_entropy"}
    if unknown:
        raise ValueError(f"outputs must be among ('token_loss', 'student_entropy'), got {sorted(unknown)}")
    loss, token_loss, entropy = _op(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        labels.reshape(-1).long(),
        student_bias,
        None if teacher_bias is None else teacher_bias.detach(),
        *flat_low_rank(student_low_rank),
        *(None if each is None else each.detach() for each in flat_low_rank(teacher_low_rank)),
        None if token_weights is None else token_weights.detach().reshape(-1),
        items,
        divisor,
        reduction,
        ignore_index,
        float(beta),
        *student_spec[1:3],
        *teacher_spec[1:3],
        products_dtype(student_hidden, student_weight, compute_dtype),
        products_dtype(teacher_hidden, teacher_weight, compute_dtype),
        tile_bytes,
        max_valid,
        "student_entropy" in outputs,
    )
    loss = loss.view(shape) if reduction == "none" else loss
    if not outputs:
        return loss
    return JSDOutput(
        loss,
        token_loss.view(shape) if "token_loss" in outputs else None,
        entropy.view(shape) if "student_entropy" in outputs else None,
    )
