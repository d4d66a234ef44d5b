"""The row mathematics of softmax cross entropy, shared by ``cross_entropy`` and every tile of ``linear_cross_entropy``.

For a row of logits ``l`` with label ``y`` (all in fp32, or in float64 where the logits are):

.. code-block:: text

    z    = inner * l                                  without a soft-cap
    z    = outer * tanh(inner * l)                    with one
    lse  = log(sum_c exp(z_c))
    loss = t * ((1 - e) * w_y * (lse - z_y) + e / V * sum_c w_c * (lse - z_c) + zeta * lse**2)

with label smoothing ``e`` (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567), z-loss ``zeta`` (Chowdhery et al.,
2022, https://arxiv.org/abs/2204.02311), class weights ``w`` and the token's weight ``t``. With token scaling ``t`` is
also multiplied by the label's own probability, as a constant (Wu et al., 2025, https://arxiv.org/abs/2508.05629). With
``a = (1 - e) * w_y`` and ``b = e / V`` the gradient is

.. code-block:: text

    dloss/dz_c = t * (softmax(z)_c * (a + b * sum(w) + 2 * zeta * lse) - a * [c = y] - b * w_c)

The log-sum-exp is taken in one pass (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype
from ._launch import launch
from ._triton import tl, triton

__all__ = ["RowLoss", "loss_of_rows", "softmax_loss_rows"]


class RowLoss(NamedTuple):
    """The constants of the row formula above; ``outer`` is 0 without a soft-cap."""

    ignore_index: int
    inner: float
    outer: float
    label_smoothing: float
    z_loss: float
    token_scaling: bool

    @classmethod
    def of(
        cls,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
        temperature: float,
        label_smoothing: float,
        z_loss: float,
        token_scaling: bool = False,
    ) -> "RowLoss":
        """``z = softcap * tanh(logit_scale * l / softcap) / temperature``, as ``inner`` and ``outer``."""
        if softcap is None:
            return cls(ignore_index, logit_scale / temperature, 0.0, label_smoothing, z_loss, token_scaling)
        return cls(ignore_index, logit_scale / softcap, softcap / temperature, label_smoothing, z_loss, token_scaling)


@triton.jit
def _transform(logits, inner, outer, SOFTCAP: tl.constexpr):
    """``log2(e) * z``, of which a power of 2 is one instruction, and the slope of it, of a block of logits in fp32."""
    if SOFTCAP:
        decay = tl.exp(-2.0 * tl.abs(inner * logits))
        tanh = (1.0 - decay) / (1.0 + decay)
        tanh = tl.where(logits < 0, -tanh, tanh)
        outer *= 1.4426950408889634
        # 1 - tanh**2 without its cancellation.
        return outer * tanh, inner * outer * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        inner *= 1.4426950408889634
        return inner * logits, inner


@triton.jit
def _statistics_of_block(
    maximum,  # (BLOCK // LANE,)
    total,  # (BLOCK // LANE,)
    weighted_z,  # (BLOCK // LANE,)
    moment,  # (BLOCK // LANE,)
    squares,  # (BLOCK // LANE,)
    best,
    best_column,
    logits_ptr,
    class_weights_ptr,
    start,
    n_classes,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MOMENT: tl.constexpr,
    SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
    MASKED: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """Add a block of a row to its running statistics. z and what is made of it is in units of ``ln(2)``.

    MOMENT and SQUARES: whether to sum ``exp(z) * z`` and ``exp(z)**2`` as well, relative to the maximum as the total.
    """
    columns = start + tl.arange(0, BLOCK)
    mask = columns < n_classes if MASKED else None
    logits = tl.load(logits_ptr + columns, mask=mask, eviction_policy=POLICY)
    z, _slope = _transform(logits.to(tl.float32), inner, outer, SOFTCAP)
    if SMOOTHING:
        weighted = z
        if class_weights_ptr is not None:
            weighted *= tl.load(class_weights_ptr + columns, mask=mask).to(tl.float32)
        if MASKED:
            weighted = tl.where(mask, weighted, 0.0)
        weighted_z += tl.sum(tl.reshape(weighted, (BLOCK // LANE, LANE)), 1)
    if MASKED:
        z = tl.where(mask, z, float("-inf"))
    if ARGMAX:
        block_best, block_column = tl.max(z, 0, return_indices=True)
        better = block_best > best
        best = tl.where(better, block_best, best)
        best_column = tl.where(better, start + block_column, best_column)
    z = tl.reshape(z, (BLOCK // LANE, LANE))
    block_maximum = tl.maximum(maximum, tl.max(z, 1))
    # Neighbours that were all -inf so far must not form -inf - -inf.
    shift = tl.where(block_maximum == float("-inf"), 0.0, block_maximum)
    rescale = tl.exp2(maximum - shift)
    exponentials = tl.exp2(z - shift[:, None])
    total = total * rescale + tl.sum(exponentials, 1)
    if MOMENT:  # a class of logit -inf has no part in it
        moment = moment * rescale + tl.sum(exponentials * tl.where(z == float("-inf"), 0.0, z), 1)
    if SQUARES:
        squares = squares * rescale * rescale + tl.sum(exponentials * exponentials, 1)
    return block_maximum, total, weighted_z, moment, squares, best, best_column


@triton.jit
def _gradient_of_block(
    logits_ptr,
    gradient_ptr,
    class_weights_ptr,
    start,
    n_classes,
    label,
    lse,
    probability_factor,
    hit,
    spread,
    inner,
    outer,
    log_factor,
    square_factor,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CURVED: tl.constexpr,
    LABEL: tl.constexpr,
    MASKED: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of a block of a row; lse in units of ``ln(2)``, the factors times dz/dl where it is one.

    CURVED: whether the factor of a probability p is ``probability_factor + log_factor * log2(p) + square_factor * p``.
    LABEL: whether the label may lie in the block.
    """
    columns = start + tl.arange(0, BLOCK)
    mask = columns < n_classes if MASKED else None
    logits = tl.load(logits_ptr + columns, mask=mask, eviction_policy=POLICY)
    z, slope = _transform(logits.to(tl.float32), inner, outer, SOFTCAP)
    if CURVED:
        probability = tl.exp2(z - lse)
        log_probability = tl.where(probability == 0.0, 0.0, z - lse)
        gradient = probability * (probability_factor + log_factor * log_probability + square_factor * probability)
    else:
        gradient = tl.exp2(z - lse) * probability_factor
    if SMOOTHING:
        if class_weights_ptr is not None:
            gradient -= spread * tl.load(class_weights_ptr + columns, mask=mask).to(tl.float32)
        else:
            gradient -= spread
    if LABEL:
        gradient -= tl.where(columns == label, hit, 0.0)
    if SOFTCAP:
        gradient *= slope
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + columns, gradient, mask=mask, eviction_policy=POLICY)


@triton.jit
def _softmax_loss_kernel(
    logits_ptr,  # (R, V), rows logits_stride apart
    logits_stride,
    gradient_ptr,  # (R, V) or None; may be logits_ptr
    gradient_stride,
    labels_ptr,  # (N,)
    rows_ptr,  # (R,) the row of the (N,) arrays that a row of logits stands for, or None where they are the same
    token_weights_ptr,  # (N,) or None
    class_weights_ptr,  # (V,), of all classes, or None
    token_loss_ptr,  # (N,) out, or None where lse is known
    lse_ptr,  # (N,) out, or in where KNOWN_LSE
    predicted_ptr,  # (N,) out, or None
    upstream_ptr,  # scalar or (N,), or None for 1
    upstream_stride,
    scale_ptr,  # scalar, or None for 1
    n_classes,  # of the logits
    n_all_classes,  # of which they may be a part, where KNOWN_LSE
    first_class,
    ignore_index,
    inner,
    outer,
    smoothing,
    z_loss,
    gradient_scale,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TOKEN_SCALING: tl.constexpr,
    KNOWN_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    # The gradient pass reads the row a second time: as much of it as can be should wait in the L2 until then.
    first_policy: tl.constexpr = "" if gradient_ptr is None else "evict_last"
    last_policy: tl.constexpr = "evict_first"
    tile_row = tl.program_id(0).to(tl.int64)
    row = tile_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr + tile_row)
    label = tl.load(labels_ptr + row)
    logits_ptr += tile_row * logits_stride
    if gradient_ptr is not None:
        gradient_ptr += tile_row * gradient_stride

    if label == ignore_index:
        if not KNOWN_LSE:
            tl.store(token_loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if predicted_ptr is not None:
                tl.store(predicted_ptr + row, -1)
        if gradient_ptr is not None:
            zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
            for start in range(0, n_classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(gradient_ptr + columns, zeros, mask=columns < n_classes)
        return

    in_range = (label >= 0) & (label < n_all_classes)
    safe_label = tl.where(in_range, label, 0)
    label_weight = 1.0
    total_class_weight = n_all_classes * 1.0
    token_weight = 1.0
    if class_weights_ptr is not None:
        label_weight = tl.load(class_weights_ptr + safe_label).to(tl.float32)
    if token_weights_ptr is not None:
        token_weight = tl.load(token_weights_ptr + row).to(tl.float32)
    if class_weights_ptr is not None and SMOOTHING:
        class_weight_sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_all_classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            class_weight_sums += tl.load(class_weights_ptr + columns, mask=columns < n_all_classes, other=0.0).to(
                tl.float32
            )
        total_class_weight = tl.sum(class_weight_sums, 0)
    if class_weights_ptr is not None:
        class_weights_ptr += first_class

    if not KNOWN_LSE or TOKEN_SCALING:  # loaded before any gradient is written in the logits' place
        label_z, _label_slope = _transform(tl.load(logits_ptr + safe_label).to(tl.float32), inner, outer, SOFTCAP)
        label_z *= 0.6931471805599453
    n_whole = n_classes - n_classes % BLOCK  # the blocks that need no mask
    if KNOWN_LSE:
        lse = tl.load(lse_ptr + row)
    else:
        # A maximum and a sum of exponentials for every LANE neighbours, which one thread holds: the loop needs no
        # reduction across threads, and little more than one exponential an element.
        maximum = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK // LANE,), tl.float32)
        weighted_z = tl.zeros((BLOCK // LANE,), tl.float32)
        best = float("-inf")
        best_column = 0
        for start in range(0, n_whole, BLOCK):
            maximum, total, weighted_z, _moment, _squares, best, best_column = _statistics_of_block(
                maximum, total, weighted_z, 0.0, 0.0, best, best_column, logits_ptr, class_weights_ptr, start,
                n_classes, inner, outer, SOFTCAP, SMOOTHING, False, False, predicted_ptr is not None, False,
                first_policy, BLOCK, LANE,
            )  # fmt: skip
        if n_whole < n_classes:
            maximum, total, weighted_z, _moment, _squares, best, best_column = _statistics_of_block(
                maximum, total, weighted_z, 0.0, 0.0, best, best_column, logits_ptr, class_weights_ptr, n_whole,
                n_classes, inner, outer, SOFTCAP, SMOOTHING, False, False, predicted_ptr is not None, True,
                first_policy, BLOCK, LANE,
            )  # fmt: skip
        row_maximum = tl.max(maximum, 0)
        shift = tl.where(row_maximum == float("-inf"), 0.0, row_maximum)
        lse = 0.6931471805599453 * (row_maximum + tl.log2(tl.sum(total * tl.exp2(maximum - shift), 0)))
        lse = tl.where(in_range, lse, float("nan"))
    scaled_weight = token_weight
    if TOKEN_SCALING:
        scaled_weight *= tl.exp(label_z - lse)
    if not KNOWN_LSE:
        loss = (1.0 - smoothing) * label_weight * (lse - label_z) + z_loss * lse * lse
        if SMOOTHING:
            loss += smoothing / n_all_classes * (total_class_weight * lse - 0.6931471805599453 * tl.sum(weighted_z, 0))
        tl.store(token_loss_ptr + row, scaled_weight * loss)
        tl.store(lse_ptr + row, lse)
        if predicted_ptr is not None:
            tl.store(predicted_ptr + row, best_column)

    if gradient_ptr is not None:
        factor = gradient_scale * scaled_weight
        if upstream_ptr is not None:
            factor *= tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        if scale_ptr is not None:
            factor *= tl.load(scale_ptr).to(tl.float32)
        hit = factor * (1.0 - smoothing) * label_weight
        spread = factor * smoothing / n_all_classes
        probability_factor = hit + spread * total_class_weight + factor * 2.0 * z_loss * lse
        # A soft-cap's slope is multiplied in element by element, times log2(e); otherwise it is one number.
        slope = inner
        if SOFTCAP:
            slope = 0.6931471805599453
        hit *= slope
        spread *= slope
        probability_factor *= slope
        label_column = (safe_label - first_class).to(tl.int32)  # outside of the blocks where it is another part's
        lse *= 1.4426950408889634
        for start in range(0, n_whole, BLOCK):
            if (label_column >= start) & (label_column < start + BLOCK):
                _gradient_of_block(
                    logits_ptr, gradient_ptr, class_weights_ptr, start, n_classes, label_column, lse,
                    probability_factor, hit, spread, inner, outer, 0.0, 0.0, SOFTCAP, SMOOTHING, False, True, False,
                    last_policy, BLOCK,
                )  # fmt: skip
            else:
                _gradient_of_block(
                    logits_ptr, gradient_ptr, class_weights_ptr, start, n_classes, label_column, lse,
                    probability_factor, hit, spread, inner, outer, 0.0, 0.0, SOFTCAP, SMOOTHING, False, False, False,
                    last_policy, BLOCK,
                )  # fmt: skip
        if n_whole < n_classes:
            _gradient_of_block(
                logits_ptr, gradient_ptr, class_weights_ptr, n_whole, n_classes, label_column, lse,
                probability_factor, hit, spread, inner, outer, 0.0, 0.0, SOFTCAP, SMOOTHING, False, True, True,
                last_policy, BLOCK,
            )  # fmt: skip


def loss_of_rows(
    spec: RowLoss,
    lse: Tensor,  # (R,)
    label_z: Tensor,  # (R,)
    mean_z: Tensor,  # (R,) sum_c w_c * z_c / V, or anything without label smoothing
    label_weight: Tensor | float,  # (R,)
    mean_weight: Tensor | float,  # () sum_c w_c / V
) -> Tensor:
    """(R,) the rows' losses by the formula above, but for the token's weight."""
    loss = (1 - spec.label_smoothing) * label_weight * (lse - label_z) + spec.z_loss * lse.square()
    if spec.label_smoothing:
        loss = loss + spec.label_smoothing * (mean_weight * lse - mean_z)
    return loss


def _softmax_loss_reference(
    logits: Tensor,
    labels: Tensor,
    spec: RowLoss,
    *,
    rows: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    token_loss: Tensor | None,
    lse: Tensor,
    predicted: Tensor | None,
    gradient: Tensor | None,
    known_lse: bool,
    upstream: Tensor | None,
    first_class: int,
    n_all_classes: int,
    scale: Tensor | None,
    gradient_scale: float,
) -> None:
    index = slice(None) if rows is None else rows
    labels = labels[index]
    valid = labels != spec.ignore_index
    outside = valid & ((labels < 0) | (labels >= n_all_classes))
    safe_label = torch.where(valid & ~outside, labels, 0)
    column = safe_label - first_class
    here = (column >= 0) & (column < logits.shape[1])
    safe = torch.where(here, column, 0).unsqueeze(1)
    dtype = accumulation_dtype(logits.dtype)
    if spec.outer:
        tanh = torch.tanh(logits.to(dtype) * spec.inner)
        z = tanh * spec.outer
    else:
        z = logits.to(dtype) * spec.inner

    one = torch.ones((), dtype=dtype, device=logits.device)
    all_classes = one.expand(n_all_classes) if class_weights is None else class_weights.to(dtype)
    classes = all_classes[first_class : first_class + logits.shape[1]]
    label_weight = all_classes[safe_label]
    token_weight = one if token_weights is None else token_weights[index].to(dtype)
    label_z = z.gather(1, safe).squeeze(1)
    row_lse = lse[index] if known_lse else torch.logsumexp(z, 1).masked_fill(outside, torch.nan)
    scaled_weight = token_weight * (label_z - row_lse).exp() if spec.token_scaling else token_weight
    if not known_lse:
        assert token_loss is not None
        mean_z = z @ classes / n_all_classes if spec.label_smoothing else one
        loss = loss_of_rows(spec, row_lse, label_z, mean_z, label_weight, all_classes.mean())
        token_loss[index] = torch.where(valid, scaled_weight * loss, 0)
        lse[index] = torch.where(valid, row_lse, 0)
        if predicted is not None:
            predicted[index] = torch.where(valid, z.argmax(1), -1)
    if gradient is None:
        return
    factor = gradient_scale * scaled_weight
    if upstream is not None:
        factor = factor * (upstream if upstream.dim() == 0 else upstream[index]).to(dtype)
    if scale is not None:
        factor = factor * scale
    factor = factor.expand(len(labels))
    hit = factor * (1 - spec.label_smoothing) * label_weight
    spread = factor * spec.label_smoothing / n_all_classes
    probability_factor = hit + spread * all_classes.sum() + factor * 2 * spec.z_loss * row_lse
    dz = torch.sub(z, row_lse.unsqueeze(1)).exp_().mul_(probability_factor.unsqueeze(1))
    if spec.label_smoothing:
        dz.addcmul_(spread.unsqueeze(1), classes, value=-1)
    dz.scatter_add_(1, safe, -torch.where(here, hit, 0).unsqueeze(1))
    if spec.outer:
        dz.mul_(tanh.square_().neg_().add_(1)).mul_(spec.inner * spec.outer)
    else:
        dz.mul_(spec.inner)
    gradient.copy_(dz.masked_fill_(~valid.unsqueeze(1), 0))


def _tile(n_classes: int, itemsize: int, with_gradient: bool) -> tuple[int, int]:
    """(classes, warps) of the block in which a program goes through its row.

    A row that is read again for its gradient should still be in the L2 then: the wider it is, the wider the blocks and
    the more warps a program has, so that fewer rows are under way on a multiprocessor. A row of which only the loss is
    wanted streams best in small blocks.
    """
    widest = 4096
    if with_gradient:
        widest = 8192 if n_classes * itemsize <= 2**17 else 16384
    block = min(max(triton.next_power_of_2(n_classes), 16), widest)
    most_warps = 16 if torch.version.hip else 32  # of 64 threads there, 1024 in all
    return block, min(max(4, block // 512), most_warps)


def softmax_loss_rows(
    logits: Tensor,  # (R, V), unit stride along V
    labels: Tensor,  # (N,) int64
    spec: RowLoss,
    *,
    rows: Tensor | None = None,  # (R,) int64
    token_weights: Tensor | None = None,  # (N,)
    class_weights: Tensor | None = None,  # (V,), of all classes
    token_loss: Tensor | None = None,  # (N,) out
    lse: Tensor,  # (N,) out, or in
    predicted: Tensor | None = None,  # (N,) int64 out
    gradient: Tensor | None = None,  # (R, V) out; may be logits
    known_lse: bool = False,
    upstream: Tensor | None = None,  # () or (N,)
    first_class: int = 0,
    n_all_classes: int | None = None,
    scale: Tensor | None = None,  # ()
    gradient_scale: float = 1.0,
    use_kernel: bool,
) -> None:
    """Write each row's loss, log-sum-exp and, where a buffer is given for it, gradient of its logits.

    Rows whose label is ``ignore_index`` get zeros; rows whose label lies outside [0, V) get NaN and read nothing
    outside the logits. The gradient is multiplied by ``gradient_scale``, ``upstream`` and ``scale``. Where lse is known
    and without token scaling, the logits may be those of some of ``n_all_classes`` classes, from ``first_class`` on.
    """
    if logits.numel() == 0:
        return
    n_all_classes = logits.shape[1] if n_all_classes is None else n_all_classes
    if not use_kernel or logits.dtype == torch.float64:
        _softmax_loss_reference(
            logits,
            labels,
            spec,
            rows=rows,
            token_weights=token_weights,
            class_weights=class_weights,
            token_loss=token_loss,
            lse=lse,
            predicted=predicted,
            gradient=gradient,
            known_lse=known_lse,
            upstream=upstream,
            first_class=first_class,
            n_all_classes=n_all_classes,
            scale=scale,
            gradient_scale=gradient_scale,
        )
        return
    # The kernel reads these with unit stride.
    labels = labels.contiguous()
    token_weights = None if token_weights is None else token_weights.contiguous()
    class_weights = None if class_weights is None else class_weights.contiguous()
    n_classes = logits.shape[1]
    block, warps = _tile(n_classes, logits.itemsize, gradient is not None)
    launch(
        _softmax_loss_kernel,
        (logits.shape[0], 1, 1),
        (
            logits,
            logits.stride(0),
            gradient,
            0 if gradient is None else gradient.stride(0),
            labels,
            rows,
            token_weights,
            class_weights,
            token_loss,
            lse,
            predicted,
            upstream,
            0 if upstream is None or upstream.dim() == 0 else upstream.stride(0),
            scale,
            n_classes,
            n_all_classes,
            first_class,
            *spec[:5],
            gradient_scale,
        ),
        (spec.outer != 0, spec.label_smoothing != 0, spec.token_scaling, known_lse, block, 16 // logits.itemsize),
        num_warps=warps,
    )
