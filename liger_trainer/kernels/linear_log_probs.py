"""Log-probabilities of labels under ``softmax(hidden @ weight.T)`` without the logits, for any loss built on them.

The logits exist a tile of rows at a time, and only of rows that have a label. The forward reduces each tile to a few
numbers a row. What a loss makes of them is unknown until the backward, which needs the logits again: as many rows of
them as ``cache_bytes`` allows wait in the products' dtype, the rest is multiplied once more. So three to four matrix
products in all, the fourth only for rows that were not kept; the log-sum-exp is kept of every row. With a frozen head
(LoRA) nothing needs to wait: the gradient that a row's log-probability has for its hidden state is formed in the
forward and the backward scales it, two products in all.

TRL's fused head (``trl.kernels.ChunkedLogProbFunction``) does the same in four products, recomputing every logit.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    check_head,
    check_head_labels,
    check_labels_in_range,
    check_loss_options,
    check_low_rank,
    check_same_device,
)
from ._cross_entropy_tiles import FP16_GRADIENT_SCALE
from ._dtypes import accumulation_dtype, gradient_dtype, products_dtype
from ._formed_gradients import finish
from ._library import define, define_differentiable, graph_is_kept, refuse_double_backward
from ._log_prob_rows import RowUpstream, log_prob_rows
from ._log_prob_tiles import score_tile, wanted_of
from ._products import NEED_SCHEMA, LowRank, Need, any_requires_grad, empty_gradients, flat_low_rank, gradient_dtypes
from ._softmax_loss import RowLoss
from ._tiles import Kept, least_tile_bytes, partition_rows, plan, run_class_tiles, run_tiles, without_autocast
from ._vocabulary import (
    SHARD_SCHEMA,
    Part,
    VocabularyShard,
    local_head,
    local_low_rank,
    replicated,
    sum_over_ranks,
)

__all__ = ["LOG_PROB_OUTPUTS", "LogProbs", "linear_log_probs"]

LOG_PROB_OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "top1")
_CACHE_BYTES = 512 * 2**20


class LogProbs(NamedTuple):
    """What :func:`linear_log_probs` returns when more than the log-probabilities is asked for, else None.

    All have the labels' shape and are fp32 (float64 for float64 products) but ``top1``, and 0 or False where the label
    is ignored. All but ``top1`` carry a gradient.
    """

    log_probs: Tensor  # log p of the label
    entropy: Tensor | None = None  # -sum_c p_c log(p_c), in nats
    mean_logits: Tensor | None = None  # mean over the V scaled, soft-capped and tempered logits
    log_sum_sq_probs: Tensor | None = None  # log(sum_c p_c**2)
    top1: Tensor | None = None  # bool: whether the label is the first of the largest logits


def _make_forward(use_kernel: bool) -> Any:
    def forward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        low_rank_hidden: Tensor | None,
        low_rank_weight: Tensor | None,
        ignore_index: int,
        inner: float,
        outer: float,
        compute_dtype: torch.dtype,
        tile_bytes: int | None,
        max_valid: int | None,
        entropy: bool,
        mean_logits: bool,
        log_sum_sq_probs: bool,
        top1: bool,
        kept_rows: int,
        by_classes: bool,
        group: str | None,
        first_class: int,
        n_all_classes: int,
        plan_classes: int,
        need_hidden: bool,
        need_low_rank_hidden: bool,
    ) -> tuple[Tensor, ...]:
        n = len(labels)
        part = None if group is None else Part(group, first_class, n_all_classes)
        dtype = accumulation_dtype(compute_dtype)
        rows, n_valid = partition_rows(labels, ignore_index, max_valid, use_kernel)

        def zeros(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(n if wanted else 0, dtype=dtype, device=hidden.device)

        wanted = (True, True, entropy, mean_logits, log_sum_sq_probs, top1)
        written = [zeros(flag) for flag in wanted[:-1]] + [zeros(top1, torch.bool)]
        kept = torch.empty((kept_rows, weight.shape[0]), dtype=compute_dtype, device=hidden.device)
        with without_autocast(hidden):
            gradients = run_tiles(
                hidden,
                weight,
                bias,
                LowRank.of(low_rank_hidden, low_rank_weight),
                functools.partial(
                    score_tile,
                    part=part,
                    labels=labels,
                    spec=RowLoss(ignore_index, inner, outer, 0.0, 0.0, False),
                    statistics=wanted_of(written, wanted),
                    gradient_scale=FP16_GRADIENT_SCALE if compute_dtype == torch.float16 else 1.0,
                    use_kernel=use_kernel,
                ),
                rows=rows,
                n_valid=n_valid,
                compute_dtype=compute_dtype,
                weight_gradient_dtype=compute_dtype,
                tile_bytes=tile_bytes,
                need=Need(hidden=need_hidden, low_rank_hidden=need_low_rank_hidden),
                kept=Kept(kept, known=False) if kept_rows else None,
                plan_classes=plan_classes,
            )
            sum_over_ranks(part, gradients.hidden, gradients.low_rank_hidden)
        if max_valid is not None and max_valid < n:  # a bound that is too small must not pass unseen
            dropped = (labels != ignore_index).sum() > max_valid
            written[0].masked_fill_(dropped, torch.nan)
        return *written, kept, gradients.hidden, gradients.low_rank_hidden

    return forward


def _fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any) -> Any:
    low_rank_hidden, options = arguments[1], _Options(*arguments[3:-2])
    need_hidden, need_low_rank_hidden = arguments[-2:]
    compute_dtype = options.compute_dtype
    dtype = accumulation_dtype(compute_dtype)

    def rows(flag: bool, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(labels.shape if flag else (0,), dtype=dtype)

    return (
        rows(True),
        rows(True),
        *map(rows, (options.entropy, options.mean_logits, options.log_sum_sq_probs)),
        rows(options.top1, torch.bool),
        hidden.new_empty((options.kept_rows, weight.shape[0]), dtype=compute_dtype),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=compute_dtype),
        hidden.new_empty(low_rank_hidden.shape if need_low_rank_hidden else (0,), dtype=compute_dtype),
    )


def _make_backward(use_kernel: bool, in_place: bool) -> Any:
    def backward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        low_rank_hidden: Tensor | None,
        low_rank_weight: Tensor | None,
        log_probs_upstream: Tensor | None,
        entropy_upstream: Tensor | None,
        mean_upstream: Tensor | None,
        squares_upstream: Tensor | None,
        scale: Tensor | None,
        lse: Tensor,
        entropy: Tensor,
        log_sum_sq_probs: Tensor,
        kept: Tensor,
        ignore_index: int,
        inner: float,
        outer: float,
        compute_dtype: torch.dtype,
        tile_bytes: int | None,
        max_valid: int | None,
        by_classes: bool,
        group: str | None,
        first_class: int,
        n_all_classes: int,
        plan_classes: int,
        *needs: Any,  # as NEED_SCHEMA has them
    ) -> tuple[Tensor, ...]:
        own_first, part = first_class, None if group is None else Part(group, first_class, n_all_classes)
        rows, n_valid = partition_rows(labels, ignore_index, max_valid, use_kernel)
        known = (lse, lse, entropy, lse, log_sum_sq_probs)  # of which those with an upstream gradient are read
        wanted = (True, True, entropy_upstream is not None, False, squares_upstream is not None)

        def on_tile(logits: Tensor, rows: Tensor | None, gradient: Tensor | None, first_class: int = 0) -> None:
            log_prob_rows(
                logits,
                labels,
                RowLoss(ignore_index, inner, outer, 0.0, 0.0, False),
                wanted_of(known, wanted),
                rows=rows,
                gradient=gradient,
                known=True,
                upstream=RowUpstream(log_probs_upstream, entropy_upstream, mean_upstream, squares_upstream),
                first_class=own_first + first_class,
                n_all_classes=n_all_classes,
                scale=scale,
                use_kernel=use_kernel,
            )

        engine: dict[str, Any] = {
            "rows": rows,
            "n_valid": n_valid,
            "compute_dtype": compute_dtype,
            "weight_gradient_dtype": needs[-1],
            "tile_bytes": tile_bytes,
            "need": Need(*needs[:-1]),
        }
        head = (hidden, weight, bias, LowRank.of(low_rank_hidden, low_rank_weight))
        with without_autocast(hidden):
            if by_classes:
                gradients = run_class_tiles(*head, on_tile, **engine, kept=kept if len(kept) else None)
            else:
                keeps = Kept(kept, known=True, overwrite=in_place) if len(kept) else None
                gradients = run_tiles(*head, on_tile, **engine, kept=keeps, plan_classes=plan_classes)
            sum_over_ranks(part, gradients.hidden, gradients.low_rank_hidden)
        return gradients.in_order()

    return backward


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, _, low_rank_hidden, low_rank_weight = arguments[:6]
    compute_dtype = arguments[18]
    return empty_gradients(
        hidden, weight, low_rank_hidden, low_rank_weight, compute_dtype, arguments[-6:-1], arguments[-1]
    )


_TENSORS = "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? low_rank_hidden, Tensor? low_rank_weight"
_OPTIONS = "int ignore_index, float inner, float outer, ScalarType compute_dtype, int? tile_bytes, SymInt? max_valid"
_OUTPUTS = (
    "bool entropy, bool mean_logits, bool log_sum_sq_probs, bool top1, SymInt kept_rows, bool by_classes, "
    + SHARD_SCHEMA
)
_BACKWARD = (
    f"({_TENSORS}, Tensor? log_probs_upstream, Tensor? entropy_upstream, Tensor? mean_upstream, "
    "Tensor? squares_upstream, Tensor? scale, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, "
    f"Tensor{{}} kept, {_OPTIONS}, bool by_classes, {SHARD_SCHEMA}, {NEED_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_forward = define(
    f"linear_log_probs_forward({_TENSORS}, {_OPTIONS}, {_OUTPUTS}, bool need_hidden, bool need_low_rank_hidden)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_make_forward(True),
    reference=_make_forward(False),
    fake=_fake_forward,
    tags=(torch.Tag.cudagraph_unsafe,),  # the host may wait for the number of labels
)
_backward = define(
    "linear_log_probs_backward" + _BACKWARD.format(""),
    kernel=_make_backward(True, in_place=False),
    reference=_make_backward(False, in_place=False),
    fake=_fake_backward,
    tags=(torch.Tag.cudagraph_unsafe,),
)
_backward_ = define(
    "linear_log_probs_backward_" + _BACKWARD.format("(a!)"),
    kernel=_make_backward(True, in_place=True),
    reference=_make_backward(False, in_place=True),
    fake=_fake_backward,
    tags=(torch.Tag.cudagraph_unsafe,),
)


class _Options(NamedTuple):
    """The op's arguments behind its first six."""

    ignore_index: int
    inner: float
    outer: float
    compute_dtype: torch.dtype
    tile_bytes: int | None
    max_valid: int | None
    entropy: bool
    mean_logits: bool
    log_sum_sq_probs: bool
    top1: bool
    kept_rows: int
    by_classes: bool
    group: str | None
    first_class: int
    n_all_classes: int
    plan_classes: int


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        tensors, options = arguments[:6], _Options(*arguments[6:])
        ctx.need = Need.of(ctx.needs_input_grad)
        ctx.frozen_head = not ctx.need.sums_rows
        if ctx.frozen_head:
            options = options._replace(kept_rows=0)
        tile_bytes = options.tile_bytes
        if options.by_classes and tile_bytes is None:
            whole_weight = options.plan_classes * tensors[1].shape[1] * options.compute_dtype.itemsize
            tile_bytes = least_tile_bytes(whole_weight if ctx.need.weight else 0)
        log_probs, lse, entropy, mean_logits, squares, top1, kept, *formed = _forward(
            *tensors,
            *options._replace(tile_bytes=tile_bytes),
            ctx.frozen_head and ctx.need.hidden,
            ctx.frozen_head and ctx.need.low_rank_hidden,
        )
        ctx.save_for_backward(*tensors, lse, entropy, squares, kept, *formed)
        ctx.options = options
        ctx.dtypes = gradient_dtypes(*tensors[:2], *tensors[3:])
        wanted = options[6:10]
        extra = (entropy, mean_logits, squares, top1)
        ctx.mark_non_differentiable(*(each for each, flag in zip(extra[:3], wanted) if not flag), top1)
        ctx.set_materialize_grads(False)
        return log_probs, *extra

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_log_probs")
        options: _Options = ctx.options
        rest = (None,) * len(options)
        given = [each for each in upstream[:4] if each is not None]
        if not given:
            return (*(None,) * 6, *rest)
        *tensors, formed, low_rank_formed = ctx.saved_tensors
        half = options.compute_dtype == torch.float16
        if ctx.frozen_head and upstream[0] is not None and len(given) == 1:
            factor = upstream[0].new_full((), 1 / FP16_GRADIENT_SCALE) if half else None
            of_rows = [
                finish(gradient, dtype, factor, upstream[0]) if needed else None
                for gradient, dtype, needed in (
                    (formed, ctx.dtypes[0], ctx.need.hidden),
                    (low_rank_formed, ctx.dtypes[3], ctx.need.low_rank_hidden),
                )
            ]
            return (of_rows[0], None, None, None, of_rows[1], None, *rest)
        # Rows that weigh 1/N each would underflow in fp16: there the largest gradient that comes in is made
        # FP16_GRADIENT_SCALE, and what goes out is divided by as much in fp32.
        scale = factor = None
        if half:
            largest = torch.stack([each.abs().amax() for each in given if each.numel()]).amax()
            factor = largest.clamp(min=torch.finfo(torch.float32).tiny) / FP16_GRADIENT_SCALE
            scale = 1 / factor
        weight_dtype = torch.float32 if half else ctx.dtypes[1]
        op = _backward if options.kept_rows == 0 or options.by_classes or graph_is_kept() else _backward_
        gradients = op(
            *tensors[:6], *upstream[:4], scale, *tensors[6:], *options[:6], *options[11:], *ctx.need, weight_dtype
        )
        finished = [
            finish(gradient, dtype, factor, None) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.need)
        ]
        return (*finished[:2], None, *finished[2:], *rest)


def _differentiable(*arguments: Any) -> Any:
    tensors, options = arguments[:6], _Options(*arguments[6:])
    if any_requires_grad(*tensors):
        return _LinearLogProbs.apply(*arguments)
    if options.by_classes and options.tile_bytes is None:
        options = options._replace(tile_bytes=least_tile_bytes())
    options = options._replace(kept_rows=0, by_classes=False)
    log_probs, _, *extra = _forward(*tensors, *options, False, False)[:6]
    return log_probs, *extra


_op = define_differentiable(
    f"linear_log_probs({_TENSORS}, {_OPTIONS}, {_OUTPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiable,
)


def _kept_rows(
    bound: int,
    weight: Tensor,
    plan_classes: int,
    compute_dtype: torch.dtype,
    tile_bytes: int | None,
    cache_bytes: int | None,
) -> int:
    if cache_bytes is None:
        # Where one product is to make the weight's gradient, the backward holds the logits of all rows anyway.
        # Dynamo can't read a tensor's grad_dtype.
        rounded_to = weight.dtype if torch.compiler.is_compiling() else gradient_dtype(weight)
        accumulated = rounded_to if weight.requires_grad else None
        if plan(bound, (plan_classes, weight.shape[1]), compute_dtype, accumulated, tile_bytes)[1]:
            return bound
        cache_bytes = _CACHE_BYTES
    return min(bound, cache_bytes // (plan_classes * compute_dtype.itemsize))


def linear_log_probs(
    hidden: Tensor,  # (*, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (*)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (V, r)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Collection[str] = (),
    tile_bytes: int | None = None,
    cache_bytes: int | None = None,
    least_memory: bool = False,
    max_valid: int | None = None,
    compute_dtype: torch.dtype | None = None,
    check_labels: bool = False,
    vocab_shard: VocabularyShard | None = None,
) -> Tensor | LogProbs:
    """``log_softmax(hidden @ weight.T + bias)`` at the labels, differentiable, without ever building the logits.

    The logits are ``softcap * tanh(logit_scale * l / softcap) / temperature`` (no tanh without a soft-cap) with
    ``l = hidden @ weight.T + bias``, plus ``a @ b.T`` for a ``low_rank=(a, b)``, rounded to the products' dtype as a
    linear layer rounds them; everything after is in fp32 (in float64 for float64 inputs), and so is the accumulation of
    the weights' gradients.

    Matrix products: one without grad mode, nothing being kept. With a head that is trained, three for the rows whose
    logits are kept and four for the others. With a frozen head two, if gradients come in for the log-probabilities
    alone, and else four; with a frozen head and a trained low-rank term two for the rows whose logits are kept and
    three for the others.

    Args:
        hidden: (\\*, H), floating point; contiguous along H, else copied.
        weight: (V, H), of hidden's dtype. Under autocast both may have any floating point dtype: the products run in
            the autocast dtype, and the gradient of an fp32 weight is not rounded on its way.
        labels: (\\*), integers in [0, V) or ``ignore_index``, already shifted.
        bias: (V,) or None.
        low_rank: a further term ``a @ b.T`` of the logits, as in :func:`linear_cross_entropy`.
        ignore_index: rows with this label are left out of every product.
        logit_scale, softcap, temperature: see above; softcap and temperature are above 0.
        outputs: names among ``entropy``, ``mean_logits``, ``log_sum_sq_probs`` and ``top1`` to return besides the
            log-probabilities, from the same pass over the logits.
        tile_bytes: bound of the logits tile, in bytes; a tile has at least one row. None chooses, as in
            :func:`linear_cross_entropy`.
        cache_bytes: bound of the logits, in bytes, that are kept from forward to backward instead of being recomputed.
            Where they are all the rows', the weight's gradient comes from one product and needs no fp32 buffer. None
            keeps all where that takes no more memory than the backward has anyway (in bf16 for up to about 2 * H
            rows), else 512 MiB.
        least_memory: keep no logits where ``cache_bytes`` is None, and tile the vocabulary in the backward: each
            class's part of the weight's gradient is then written once, with no fp32 buffer of the weight's size, and
            hidden's gradient accumulates in fp32 instead. Where ``tile_bytes`` is None, tiles of 128 MiB in the
            backward, and in the forward of up to 512 MiB, but no more than the weight's gradient will take.
        max_valid: an upper bound, known to the host, of the number of labels that are not ignored. It spares the host
            the wait for the device's own count. With a bound that is too small every log-probability is NaN.
        compute_dtype: dtype of the products, where it is not to follow from autocast and the inputs.
        check_labels: also check on an accelerator that the labels are in range, which waits for the device.
        vocab_shard: as in :func:`linear_cross_entropy`, and so is a ``DTensor`` weight. Communication: a gather of 2
            numbers a token and tile (1 more for each of the outputs, 2 for ``top1``) in the forward, and one sum of
            hidden's gradient in the backward (with a frozen head in the forward).

    Returns:
        The labels' log-probabilities in the labels' shape, fp32, 0 where the label is ignored; or :class:`LogProbs`
        when ``outputs`` names something.

    Raises:
        TypeError: for a dtype that is not as above, or labels that are not integers.
        ValueError: for shapes that don't match, an option outside its range, tensors on different devices, a DTensor
            that is divided otherwise, and, on the CPU or with ``check_labels``, a label outside [0, V). Elsewhere such
            a label gives NaN.
        RuntimeError: in a double backward.
    """
    check_loss_options("none", 0.0, 0.0, softcap, temperature)
    weight, bias, vocab_shard = local_head(weight, bias, vocab_shard)
    if vocab_shard is not None:
        hidden, labels = replicated(hidden), replicated(labels)
        low_rank = local_low_rank(low_rank)
    check_head(hidden, weight, bias)
    check_low_rank(low_rank, hidden, weight)
    check_head_labels(hidden, labels)
    shard = (None, 0, weight.shape[0], weight.shape[0]) if vocab_shard is None else vocab_shard.arguments()
    check_same_device(hidden.device, labels=labels)
    unknown = set(outputs) - set(LOG_PROB_OUTPUTS)
    if unknown:
        raise ValueError(f"outputs must be among {LOG_PROB_OUTPUTS}, got {sorted(unknown)}")
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"tile_bytes must be above 0, got {tile_bytes}")
    if cache_bytes is not None and cache_bytes < 0:
        raise ValueError(f"cache_bytes must be at least 0, got {cache_bytes}")
    if least_memory and cache_bytes is None:
        cache_bytes = 0
    compute_dtype = products_dtype(hidden, weight, compute_dtype)
    flat_labels = labels.reshape(-1).long()
    if check_labels or (hidden.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_labels_in_range(flat_labels, shard[2], ignore_index)
    if max_valid is None and not torch.compiler.is_compiling():
        max_valid = int((flat_labels != ignore_index).sum())
    bound = len(flat_labels) if max_valid is None else min(max_valid, len(flat_labels))
    spec = RowLoss.of(ignore_index, logit_scale, softcap, temperature, 0.0, 0.0)
    results = _op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat_labels,
        bias,
        *flat_low_rank(low_rank),
        *spec[:3],
        compute_dtype,
        tile_bytes,
        max_valid,
        *(name in outputs for name in LOG_PROB_OUTPUTS),
        _kept_rows(bound, weight, shard[3], compute_dtype, tile_bytes, cache_bytes),
        least_memory,
        *shard,
    )
    log_probs, *extra = results
    if not outputs:
        return log_probs.view(labels.shape)
    return LogProbs(
        log_probs.view(labels.shape),
        *(each.view(labels.shape) if name in outputs else None for name, each in zip(LOG_PROB_OUTPUTS, extra)),
    )
