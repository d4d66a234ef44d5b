"""Cross entropy of ``softmax(hidden @ weight.T)`` without the logits: the language-model head and its loss in one op.

The logits exist a tile of rows at a time. Because the loss is a known reduction, each tile's gradient is formed in the
forward, in the place of its logits, and multiplied on into both inputs' gradients: three matrix products in all, and
the backward only scales, which for an upstream gradient of 1 it need not. Rows whose label is ignored take part in none
of them. The weight's gradient accumulates in fp32: in a buffer over the tiles, or inside a single product where the
logits of all rows take no more memory than tile and buffer would. The idea of forming gradients in the forward is
Liger-Kernel's (Hsu et al., 2024, https://arxiv.org/abs/2410.10989); Wijmans et al., 2024 (Cut Cross-Entropy,
https://arxiv.org/abs/2411.09009) instead recompute every logit.
"""

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
    check_vector,
)
from ._cross_entropy_tiles import FP16_GRADIENT_SCALE, tile_loss
from ._dtypes import accumulation_dtype, products_dtype
from ._formed_gradients import finish
from ._library import define, define_differentiable, refuse_double_backward
from ._products import NEED_SCHEMA, LowRank, Need, any_requires_grad, empty_gradients, flat_low_rank, gradient_dtypes
from ._reduction import loss_scale, row_weights
from ._softmax_loss import RowLoss
from ._tiles import partition_rows, run_tiles, without_autocast
from ._vocabulary import SHARD_SCHEMA, Part, VocabularyShard, local_head, local_low_rank, replicated, sum_over_ranks
from .cross_entropy import CrossEntropyOutput, gather_outputs

__all__ = ["linear_cross_entropy"]


def _make_forward(use_kernel: bool) -> Any:
    def forward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        low_rank_hidden: Tensor | None,
        low_rank_weight: Tensor | None,
        token_weights: Tensor | None,
        class_weights: Tensor | None,
        num_items: Tensor | None,
        divisor: float | None,
        ignore_index: int,
        reduction: str,
        inner: float,
        outer: float,
        label_smoothing: float,
        z_loss: float,
        token_scaling: bool,
        compute_dtype: torch.dtype,
        tile_bytes: int | None,
        max_valid: int | None,
        predict: bool,
        group: str | None,
        first_class: int,
        n_all_classes: int,
        plan_classes: int,
        *needs: Any,  # as NEED_SCHEMA has them
    ) -> tuple[Tensor, ...]:
        n = len(labels)
        part = None if group is None else Part(group, first_class, n_all_classes)
        dtype = accumulation_dtype(compute_dtype)
        rows, n_valid = partition_rows(labels, ignore_index, max_valid, use_kernel)
        # Rows that are dropped keep these zeros; so do those that a bound which is too small would drop.
        token_loss, lse = (torch.zeros(n, dtype=dtype, device=hidden.device) for _ in range(2))
        scale = loss_scale(
            labels,
            mean=reduction == "mean",
            weights=row_weights(labels, ignore_index, token_weights, class_weights, dtype),
            divisor_tensor=num_items,
            divisor=divisor,
            ignore_index=ignore_index,
            n_processed=n_valid,
            dtype=dtype,
            use_kernel=use_kernel,
        )
        predicted = torch.full((n if predict else 0,), -1, dtype=labels.dtype, device=labels.device)
        with without_autocast(hidden):
            gradients = run_tiles(
                hidden,
                weight,
                bias,
                LowRank.of(low_rank_hidden, low_rank_weight),
                tile_loss(
                    part,
                    labels=labels,
                    spec=RowLoss(ignore_index, inner, outer, label_smoothing, z_loss, token_scaling),
                    token_weights=token_weights,
                    class_weights=class_weights,
                    token_loss=token_loss,
                    lse=lse,
                    scale=scale,
                    predicted=predicted if predict else None,
                    use_kernel=use_kernel,
                ),
                rows=rows,
                n_valid=n_valid,
                compute_dtype=compute_dtype,
                weight_gradient_dtype=needs[-1],
                tile_bytes=tile_bytes,
                need=Need(*needs[:-1]),
                plan_classes=plan_classes,
            )
            sum_over_ranks(part, gradients.hidden, gradients.low_rank_hidden)
        if reduction == "none":
            # scale is NaN where the bound was too small, and so must be the loss of rows that were dropped wrongly.
            loss = torch.where(scale.isnan(), torch.nan, token_loss)
        else:
            loss = token_loss.sum() * scale
        return loss, token_loss, lse, predicted, scale, *gradients.in_order()

    return forward


def _fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    low_rank_hidden, low_rank_weight = arguments[1:3]
    options = _Options(*arguments[3:-6])
    rows = hidden.new_empty(labels.shape, dtype=accumulation_dtype(options.compute_dtype))
    scalar = rows.new_empty(())
    return (
        torch.empty_like(rows if options.reduction == "none" else scalar),
        rows,
        torch.empty_like(rows),
        labels.new_empty(labels.shape if options.predict else (0,)),
        scalar,
        *empty_gradients(
            hidden, weight, low_rank_hidden, low_rank_weight, options.compute_dtype, arguments[-6:-1], arguments[-1]
        ),
    )


def _make_rows_backward(use_kernel: bool) -> Any:
    def backward(
        upstream: Tensor,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        low_rank_hidden: Tensor | None,
        low_rank_weight: Tensor | None,
        token_weights: Tensor | None,
        class_weights: Tensor | None,
        lse: Tensor,
        scale: Tensor,
        ignore_index: int,
        inner: float,
        outer: float,
        label_smoothing: float,
        z_loss: float,
        token_scaling: bool,
        compute_dtype: torch.dtype,
        tile_bytes: int | None,
        max_valid: int | None,
        group: str | None,
        first_class: int,
        n_all_classes: int,
        plan_classes: int,
        *needs: Any,  # as NEED_SCHEMA has them
    ) -> tuple[Tensor, ...]:
        part = None if group is None else Part(group, first_class, n_all_classes)
        rows, n_valid = partition_rows(labels, ignore_index, max_valid, use_kernel)
        with without_autocast(hidden):
            gradients = run_tiles(
                hidden,
                weight,
                bias,
                LowRank.of(low_rank_hidden, low_rank_weight),
                tile_loss(
                    part,
                    labels=labels,
                    spec=RowLoss(ignore_index, inner, outer, label_smoothing, z_loss, token_scaling),
                    token_weights=token_weights,
                    class_weights=class_weights,
                    lse=lse,
                    scale=scale,
                    known_lse=True,
                    upstream=upstream,
                    use_kernel=use_kernel,
                ),
                rows=rows,
                n_valid=n_valid,
                compute_dtype=compute_dtype,
                weight_gradient_dtype=needs[-1],
                tile_bytes=tile_bytes,
                need=Need(*needs[:-1]),
                plan_classes=plan_classes,
            )
            sum_over_ranks(part, gradients.hidden, gradients.low_rank_hidden)
        return gradients.in_order()

    return backward


def _fake_rows_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    low_rank_hidden, low_rank_weight = arguments[1:3]
    compute_dtype, need, weight_dtype = arguments[13], arguments[-6:-1], arguments[-1]
    return empty_gradients(hidden, weight, low_rank_hidden, low_rank_weight, compute_dtype, need, weight_dtype)


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? low_rank_hidden, Tensor? low_rank_weight, "
    "Tensor? token_weights, Tensor? class_weights"
)
_SPEC = "float inner, float outer, float label_smoothing, float z_loss, bool token_scaling"
_ENGINE = "ScalarType compute_dtype, int? tile_bytes, SymInt? max_valid"
_OPTIONS = (
    f"Tensor? num_items, float? divisor, int ignore_index, str reduction, {_SPEC}, {_ENGINE}, bool predict, "
    + SHARD_SCHEMA
)

_forward = define(
    f"linear_cross_entropy_forward({_TENSORS}, {_OPTIONS}, {NEED_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_make_forward(True),
    reference=_make_forward(False),
    fake=_fake_forward,
    tags=(torch.Tag.cudagraph_unsafe,),  # the host may wait for the number of labels
)
_rows_backward = define(
    f"linear_cross_entropy_rows_backward(Tensor upstream, {_TENSORS}, Tensor lse, Tensor scale, int ignore_index,"
    f" {_SPEC}, {_ENGINE}, {SHARD_SCHEMA}, {NEED_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_make_rows_backward(True),
    reference=_make_rows_backward(False),
    fake=_fake_rows_backward,
    tags=(torch.Tag.cudagraph_unsafe,),  # the host may wait for the number of labels
)


class _Options(NamedTuple):
    """The op's arguments behind its first six."""

    token_weights: Tensor | None
    class_weights: Tensor | None
    num_items: Tensor | None
    divisor: float | None
    ignore_index: int
    reduction: str
    inner: float
    outer: float
    label_smoothing: float
    z_loss: float
    token_scaling: bool
    compute_dtype: torch.dtype
    tile_bytes: int | None
    max_valid: int | None
    predict: bool
    group: str | None
    first_class: int
    n_all_classes: int
    plan_classes: int


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of a reduced loss wait, formed, for the one factor that is still to come."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        hidden, weight, labels, bias, *low_rank = arguments[:6]
        options = _Options(*arguments[6:])
        ctx.per_row = options.reduction == "none"
        ctx.need = Need.of(ctx.needs_input_grad)
        # An unreduced loss has an upstream gradient a row, which the sum over rows in the weight's gradient can't take
        # later: there the tiles are computed again in the backward. The gradient of hidden can take it.
        ctx.again = ctx.per_row and ctx.need.sums_rows
        ctx.dtypes = gradient_dtypes(hidden, weight, bias, *low_rank)
        half = options.compute_dtype == torch.float16  # rounded only after its factor
        ctx.weight_dtype = torch.float32 if half else ctx.dtypes[1]
        need = Need() if ctx.again else ctx.need
        loss, token_loss, lse, predicted, scale, *gradients = _forward(*arguments, *need, ctx.weight_dtype)
        ctx.mark_non_differentiable(token_loss, lse, predicted, scale)
        ctx.set_materialize_grads(False)
        if ctx.again:
            tensors = (hidden, weight, labels, bias, *low_rank, options.token_weights, options.class_weights)
            ctx.save_for_backward(*tensors, lse, scale)
        else:
            ctx.save_for_backward(scale, *gradients)
        ctx.options = options._replace(token_weights=None, class_weights=None, num_items=None)
        return loss, token_loss, lse, predicted, scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_cross_entropy")
        options: _Options = ctx.options
        rest = (None,) * len(options)
        if upstream is None:
            return (*(None,) * 6, *rest)
        if ctx.again:
            *tensors, scale = ctx.saved_tensors
            gradients = _rows_backward(
                upstream,
                *tensors,
                scale,
                options.ignore_index,
                options.inner,
                options.outer,
                options.label_smoothing,
                options.z_loss,
                options.token_scaling,
                options.compute_dtype,
                options.tile_bytes,
                options.max_valid,
                *options[-4:],
                *ctx.need,
                ctx.weight_dtype,
            )
        else:
            scale, *gradients = ctx.saved_tensors
        factor = None if ctx.per_row else upstream
        row_scale = upstream if ctx.per_row and not ctx.again else None
        if options.compute_dtype == torch.float16:
            factor = (1 if factor is None else factor) * scale / FP16_GRADIENT_SCALE
        finished = [
            finish(gradient, dtype, factor, row_scale) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.need)
        ]
        return (*finished[:2], None, *finished[2:], *rest)


def _differentiable(*arguments: Any) -> Any:
    if any_requires_grad(*arguments[:6]):
        return _LinearCrossEntropy.apply(*arguments)
    return _forward(*arguments, *Need(), arguments[1].dtype)[:5]


_op = define_differentiable(
    f"linear_cross_entropy({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _differentiable
)


def linear_cross_entropy(
    hidden: Tensor,  # (*, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (*)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (V, r)
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,  # (*)
    class_weights: Tensor | None = None,  # (V,)
    token_scaling: bool = False,
    tile_bytes: int | None = None,
    max_valid: int | None = None,
    compute_dtype: torch.dtype | None = None,
    outputs: Collection[str] = (),
    check_labels: bool = False,
    vocab_shard: VocabularyShard | None = None,
) -> Tensor | CrossEntropyOutput:
    """``cross_entropy(hidden @ weight.T + bias, labels)`` without ever building the logits.

    The logits are ``softcap * tanh(logit_scale * l / softcap) / temperature`` (no tanh without a soft-cap) with
    ``l = hidden @ weight.T + bias``, plus ``a @ b.T`` for a ``low_rank=(a, b)``, rounded to the products' dtype as a
    linear layer rounds them; everything after is in fp32 (in float64 for float64 inputs), and so is the accumulation of
    the weights' gradients.

    Memory besides inputs and gradients: one tile of ``tile_bytes`` and, where the weight wants a gradient in less than
    fp32, V * H fp32 numbers; or all logits at once, where these take no more than that (in bf16 for up to about
    2 * H rows). Without grad mode one matrix product runs and nothing is kept.

    Gradients are rounded once to their dtype, the weight's to ``weight.grad_dtype``, when the upstream gradient is 1 or
    any other power of two; else bf16 ones are rounded once more when it is multiplied in.

    Args:
        hidden: (\\*, H), floating point; contiguous along H, else copied.
        weight: (V, H), of hidden's dtype. Under autocast both may have any floating point dtype: the products run in
            the autocast dtype, and the gradient of an fp32 weight is not rounded on its way.
        labels: (\\*), integers in [0, V) or ``ignore_index``, already shifted.
        bias: (V,) or None.
        low_rank: a pair ``a`` (\\*, r) and ``b`` (V, r), floating point of any dtype, whose product ``a @ b.T`` is
            added to the logits, as a LoRA adapter's is: ``a`` is then the scaled output of its first layer. It is one
            more product into each tile; no merged weight is made. Both get a gradient, and ``b``'s accumulates in fp32.
        ignore_index: rows with this label are left out of every product.
        reduction: ``"mean"`` over the labels not ignored (over their weights, with ``token_weights`` or
            ``class_weights``), ``"sum"``, or ``"none"`` for the labels' shape, which takes any upstream gradient at the
            price of a fourth product where the weight wants one.
        num_items: divides the sum instead, for ``"mean"`` over gradient-accumulation steps; a number or a 0-dim tensor.
        logit_scale, softcap, temperature: see above; softcap and temperature are above 0.
        label_smoothing, z_loss: as in :func:`cross_entropy`.
        token_weights: (\\*) factors of the tokens' losses; no gradient flows to them. In fp16 keep them below 30.
        class_weights: (V,) as ``weight`` of :func:`torch.nn.functional.cross_entropy`; no gradient flows to them.
        token_scaling: multiply each token's loss by its label's probability, taken as a constant (dynamic fine-tuning;
            Wu et al., 2025, https://arxiv.org/abs/2508.05629). The mean's divisor does not change.
        tile_bytes: bound of the logits tile, in bytes; a tile has at least one row. None chooses: what the gradient of
            the weight takes, which costs nothing where that is rounded from a buffer in the end (at least 256 MiB), or
            512 MiB where nothing is rounded, the weight being frozen or in fp32.
        max_valid: an upper bound, known to the host, of the number of labels that are not ignored. It spares the host
            the wait for the device's own count. With a bound that is too small the loss is NaN.
        compute_dtype: dtype of the products, where it is not to follow from autocast and the inputs.
        outputs: names among ``token_loss``, ``token_accuracy``, ``predicted_tokens``, ``z_loss`` to return besides the
            loss, none of which carries a gradient.
        check_labels: also check on an accelerator that the labels are in range, which waits for the device.
        vocab_shard: where ``weight`` and ``bias`` are this rank's rows of a head that a process group holds together.
            All its ranks call with the same hidden states, labels and options, and all get the same loss and the whole
            gradient of hidden; each gets the gradient of its own rows. A ``DTensor`` weight with Shard(0) on a mesh of
            one dimension (and such a bias) goes this way by itself, its hidden states being a DTensor on the same mesh
            or a plain tensor that is equal on every rank. Communication: a gather of 2 numbers a token and tile (3 with
            label smoothing, 2 more for predictions), and one sum of hidden's gradient. Rows whose labels differ between
            ranks are NaN.

    Returns:
        The loss in fp32, () or the labels' shape, or a :class:`CrossEntropyOutput` when ``outputs`` names something.

    Raises:
        TypeError: for a dtype that is not as above, or labels that are not integers.
        ValueError: for shapes that don't match, an option outside its range, tensors on different devices, a DTensor
            that is divided otherwise, and, on the CPU or with ``check_labels``, a label outside [0, V). Elsewhere such
            a label makes the loss NaN.
        RuntimeError: in a double backward.
    """
    check_loss_options(reduction, label_smoothing, z_loss, softcap, temperature)
    weight, bias, vocab_shard = local_head(weight, bias, vocab_shard)
    if vocab_shard is not None:
        hidden, labels = replicated(hidden), replicated(labels)
        low_rank = local_low_rank(low_rank)
    check_head(hidden, weight, bias)
    check_low_rank(low_rank, hidden, weight)
    check_head_labels(hidden, labels)
    shard = (None, 0, weight.shape[0], weight.shape[0]) if vocab_shard is None else vocab_shard.arguments()
    n_classes = shard[2]
    check_vector("class_weights", class_weights, n_classes, "a weight a row of weight")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights must have labels' shape {tuple(labels.shape)}, got {tuple(token_weights.shape)}"
        )
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the sum of the losses and goes with reduction='mean', got {reduction!r}")
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"tile_bytes must be above 0, got {tile_bytes}")
    if isinstance(num_items, (int, float)) and torch.compiler.is_compiling():
        # As a number it would be part of the graph, and every batch would need another graph.
        num_items = torch.ones((), dtype=torch.float32, device=hidden.device) * num_items
    divisor = None if num_items is None or isinstance(num_items, Tensor) else float(num_items)
    if divisor is not None and not divisor > 0:
        raise ValueError(f"num_items must be above 0, got {num_items}")
    items = num_items if isinstance(num_items, Tensor) else None
    check_same_device(
        hidden.device,
        labels=labels,
        token_weights=token_weights,
        class_weights=class_weights,
        num_items=items,
    )
    compute_dtype = products_dtype(hidden, weight, compute_dtype)
    flat_labels = labels.reshape(-1).long()
    if check_labels or (hidden.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_labels_in_range(flat_labels, n_classes, ignore_index)
    spec = RowLoss.of(ignore_index, logit_scale, softcap, temperature, label_smoothing, z_loss, token_scaling)
    predict = "token_accuracy" in outputs or "predicted_tokens" in outputs
    loss, token_loss, lse, predicted, scale = _op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat_labels,
        bias,
        *flat_low_rank(low_rank),
        None if token_weights is None else token_weights.reshape(-1),
        class_weights,
        items,
        divisor,
        ignore_index,
        reduction,
        *spec[1:],
        compute_dtype,
        tile_bytes,
        max_valid,
        predict,
        *shard,
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
        token_weights=None if token_weights is None else token_weights.reshape(-1),
    )
