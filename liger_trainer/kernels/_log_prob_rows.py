"""The row mathematics of log-probabilities and their companions, over every tile of ``linear_log_probs``.

For a row of logits with label ``y``, transformed into ``z`` as in :mod:`._softmax_loss`, with ``p = softmax(z)``:

.. code-block:: text

    lse               = log(sum_c exp(z_c))
    log_prob          = z_y - lse
    entropy           = lse - sum_c p_c z_c
    mean_logit        = sum_c z_c / V
    log_sum_sq_probs  = log(sum_c p_c**2) = log(sum_c exp(2 z_c)) - 2 lse
    top1              = [y is the first of the largest z]

With upstream gradients ``g`` of the first four, in this order ``g_l, g_e, g_m, g_s``, that of z is

.. code-block:: text

    g_l [c = y] + g_m / V + p_c (-g_l - g_e (log(p_c) + entropy) - 2 g_s + 2 g_s p_c / sum(p**2))
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype
from ._launch import launch
from ._softmax_loss import RowLoss, _gradient_of_block, _statistics_of_block, _tile, _transform
from ._triton import tl, triton

__all__ = ["RowStatistics", "RowUpstream", "log_prob_rows"]


class RowStatistics(NamedTuple):
    """What a pass over the logits of N rows writes; what is not wanted is None. All fp32 (float64 with it)."""

    log_probs: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor | None = None  # (N,)
    mean_logits: Tensor | None = None  # (N,)
    log_sum_sq_probs: Tensor | None = None  # (N,)
    top1: Tensor | None = None  # (N,) bool
    # Of logits that are a part of all classes; log_probs is then the label's z, or inf where another part has it, and
    # mean_logits the part's share in the mean over all classes, each z times its class weight where there are some.
    best: Tensor | None = None  # (N,) the largest z
    best_class: Tensor | None = None  # (N,) the first class that has it


class RowUpstream(NamedTuple):
    """The gradients that flow into the rows' statistics; None is zero."""

    log_probs: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)
    mean_logits: Tensor | None = None  # (N,)
    log_sum_sq_probs: Tensor | None = None  # (N,)


@triton.jit
def _log_prob_kernel(
    logits_ptr,  # (R, V), rows logits_stride apart
    logits_stride,
    gradient_ptr,  # (R, V) or None; may be logits_ptr
    gradient_stride,
    labels_ptr,  # (N,)
    rows_ptr,  # (R,) the row of the (N,) arrays that a row of logits stands for, or None where they are the same
    log_probs_ptr,  # (N,) out, or None where the statistics are known
    lse_ptr,  # (N,) out, or in where KNOWN
    entropy_ptr,  # (N,) the same, or None
    mean_ptr,  # (N,) out, or None
    squares_ptr,  # (N,) out, or in where KNOWN, or None
    top1_ptr,  # (N,) out, or None
    best_ptr,  # (N,) out, or None
    best_class_ptr,  # (N,) out, or None
    class_weights_ptr,  # (V,), of all classes, or None; where PART
    log_prob_upstream_ptr,  # (N,), or None for 0; without any of the four, 1
    entropy_upstream_ptr,
    mean_upstream_ptr,
    squares_upstream_ptr,
    scale_ptr,  # scalar, or None for 1
    n_classes,  # of the logits
    n_all_classes,  # of which they may be a part, where KNOWN or PART
    first_class,
    ignore_index,
    inner,
    outer,
    gradient_scale,
    SOFTCAP: tl.constexpr,
    KNOWN: tl.constexpr,
    PART: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
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

    if label == ignore_index:  # whose statistics hold their zeros already
        if gradient_ptr is not None:
            zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
            for start in range(0, n_classes, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(gradient_ptr + columns, zeros, mask=columns < n_classes)
        return

    in_range = (label >= 0) & (label < n_all_classes)
    here = in_range & (label >= first_class) & (label < first_class + n_classes)
    if KNOWN:  # a label outside has made lse NaN
        label_column = (label - first_class).to(tl.int32)
    else:
        label_column = tl.where(here, label - first_class, 0).to(tl.int32)
    if class_weights_ptr is not None:
        class_weights_ptr += first_class
    n_whole = n_classes - n_classes % BLOCK  # the blocks that need no mask
    if KNOWN:
        lse = tl.load(lse_ptr + row)
    else:
        # Loaded before any gradient is written in the logits' place.
        label_z, _label_slope = _transform(tl.load(logits_ptr + label_column).to(tl.float32), inner, outer, SOFTCAP)
        maximum = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK // LANE,), tl.float32)
        z_sum = tl.zeros((BLOCK // LANE,), tl.float32)
        moment = tl.zeros((BLOCK // LANE,), tl.float32)
        squares = tl.zeros((BLOCK // LANE,), tl.float32)
        best = float("-inf")
        best_column = 0
        for start in range(0, n_whole, BLOCK):
            maximum, total, z_sum, moment, squares, best, best_column = _statistics_of_block(
                maximum, total, z_sum, moment, squares, best, best_column, logits_ptr, class_weights_ptr, start,
                n_classes, inner, outer, SOFTCAP, mean_ptr is not None, entropy_ptr is not None,
                squares_ptr is not None, top1_ptr is not None or best_ptr is not None, False, first_policy, BLOCK,
                LANE,
            )  # fmt: skip
        if n_whole < n_classes:
            maximum, total, z_sum, moment, squares, best, best_column = _statistics_of_block(
                maximum, total, z_sum, moment, squares, best, best_column, logits_ptr, class_weights_ptr, n_whole,
                n_classes, inner, outer, SOFTCAP, mean_ptr is not None, entropy_ptr is not None,
                squares_ptr is not None, top1_ptr is not None or best_ptr is not None, True, first_policy, BLOCK,
                LANE,
            )  # fmt: skip
        row_maximum = tl.max(maximum, 0)
        shift = tl.where(row_maximum == float("-inf"), 0.0, row_maximum)
        rescale = tl.exp2(maximum - shift)
        row_total = tl.sum(total * rescale, 0)
        lse2 = row_maximum + tl.log2(row_total)
        nan = tl.where(in_range, 0.0, float("nan"))
        lse = 0.6931471805599453 * lse2 + nan
        if PART:
            tl.store(log_probs_ptr + row, tl.where(here, 0.6931471805599453 * label_z, float("inf")) + nan)
        else:
            tl.store(log_probs_ptr + row, 0.6931471805599453 * (label_z - lse2) + nan)
        tl.store(lse_ptr + row, lse)
        if entropy_ptr is not None:
            expected_z = tl.sum(moment * rescale, 0) / row_total
            tl.store(entropy_ptr + row, 0.6931471805599453 * (lse2 - expected_z) + nan)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, 0.6931471805599453 * tl.sum(z_sum, 0) / n_all_classes + nan)
        if squares_ptr is not None:
            row_squares = tl.sum(squares * rescale * rescale, 0)
            tl.store(squares_ptr + row, 0.6931471805599453 * (tl.log2(row_squares) - 2.0 * tl.log2(row_total)) + nan)
        if top1_ptr is not None:
            tl.store(top1_ptr + row, (best_column == label_column) & in_range)
        if best_ptr is not None:
            tl.store(best_ptr + row, 0.6931471805599453 * best)
            tl.store(best_class_ptr + row, (first_class + best_column).to(best_class_ptr.dtype.element_ty))

    if gradient_ptr is not None:
        factor = tl.full((), gradient_scale, tl.float32)
        if scale_ptr is not None:
            factor *= tl.load(scale_ptr).to(tl.float32)
        # A soft-cap's slope is multiplied in element by element, times log2(e); otherwise it is one number.
        factor *= 0.6931471805599453 if SOFTCAP else inner
        hit = 0.0
        spread = 0.0
        log_factor = 0.0
        square_factor = 0.0
        if UNIT:
            hit -= factor
        if log_prob_upstream_ptr is not None:
            hit -= factor * tl.load(log_prob_upstream_ptr + row).to(tl.float32)
        probability_factor = hit
        if entropy_upstream_ptr is not None:
            upstream = factor * tl.load(entropy_upstream_ptr + row).to(tl.float32)
            probability_factor -= upstream * tl.load(entropy_ptr + row)
            log_factor -= upstream * 0.6931471805599453
        if mean_upstream_ptr is not None:
            spread -= factor * tl.load(mean_upstream_ptr + row).to(tl.float32) / n_all_classes
        if squares_upstream_ptr is not None:
            upstream = 2.0 * factor * tl.load(squares_upstream_ptr + row).to(tl.float32)
            probability_factor -= upstream
            square_factor += upstream / tl.exp(tl.load(squares_ptr + row))
        curved: tl.constexpr = entropy_upstream_ptr is not None or squares_upstream_ptr is not None
        spreads: tl.constexpr = mean_upstream_ptr is not None
        lse *= 1.4426950408889634
        for start in range(0, n_whole, BLOCK):
            if (label_column >= start) & (label_column < start + BLOCK):
                _gradient_of_block(
                    logits_ptr, gradient_ptr, None, start, n_classes, label_column, lse, probability_factor, hit,
                    spread, inner, outer, log_factor, square_factor, SOFTCAP, spreads, curved, True, False,
                    last_policy, BLOCK,
                )  # fmt: skip
            else:
                _gradient_of_block(
                    logits_ptr, gradient_ptr, None, start, n_classes, label_column, lse, probability_factor, hit,
                    spread, inner, outer, log_factor, square_factor, SOFTCAP, spreads, curved, False, False,
                    last_policy, BLOCK,
                )  # fmt: skip
        if n_whole < n_classes:
            _gradient_of_block(
                logits_ptr, gradient_ptr, None, n_whole, n_classes, label_column, lse, probability_factor, hit,
                spread, inner, outer, log_factor, square_factor, SOFTCAP, spreads, curved, True, True,
                last_policy, BLOCK,
            )  # fmt: skip


def _log_prob_reference(
    logits: Tensor,
    labels: Tensor,
    spec: RowLoss,
    statistics: RowStatistics,
    upstream: RowUpstream | None,
    *,
    rows: Tensor | None,
    gradient: Tensor | None,
    known: bool,
    part: bool,
    first_class: int,
    n_all_classes: int,
    class_weights: Tensor | None,
    scale: Tensor | None,
    gradient_scale: float,
) -> None:
    index = slice(None) if rows is None else rows
    labels = labels[index]
    valid = labels != spec.ignore_index
    outside = valid & ((labels < 0) | (labels >= n_all_classes))
    column = labels - first_class
    here = valid & (column >= 0) & (column < logits.shape[1])
    safe = torch.where(here, column, 0).unsqueeze(1)
    dtype = accumulation_dtype(logits.dtype)
    z = logits.to(dtype) * spec.inner
    tanh = torch.tanh(z) if spec.outer else None
    z = z if tanh is None else tanh * spec.outer

    def write(out: Tensor | None, values: Tensor) -> None:
        if out is not None:
            out[index] = torch.where(valid, values.masked_fill(outside, torch.nan), 0)

    lse = statistics.lse[index] if known else torch.logsumexp(z, 1)
    if not known:
        write(statistics.lse, lse)
        label_z = z.gather(1, safe).squeeze(1)
        write(statistics.log_probs, torch.where(here, label_z, torch.inf) if part else label_z - lse)
        if statistics.mean_logits is not None:
            of_part = slice(first_class, first_class + logits.shape[1])
            weighted = z if class_weights is None else z * class_weights[of_part].to(dtype)
            write(statistics.mean_logits, weighted.sum(1) / n_all_classes)
        if statistics.entropy is not None:
            probabilities = torch.sub(z, lse.unsqueeze(1)).exp_()
            write(statistics.entropy, lse - probabilities.mul_(z.masked_fill(z == -torch.inf, 0)).sum(1))
        if statistics.log_sum_sq_probs is not None:
            write(statistics.log_sum_sq_probs, torch.logsumexp(2 * z, 1) - 2 * lse)
        if statistics.top1 is not None:
            statistics.top1[index] = valid & ~outside & (z.argmax(1) == safe.squeeze(1))
        if statistics.best is not None and statistics.best_class is not None:
            write(statistics.best, z.amax(1))
            write(statistics.best_class, (z.argmax(1) + first_class).to(statistics.best_class.dtype))
    if gradient is None:
        return
    factor = torch.full((), gradient_scale, dtype=dtype, device=logits.device)
    factor = factor if scale is None else factor * scale
    if upstream is None:
        upstream = RowUpstream(torch.ones((), dtype=dtype, device=logits.device).expand(statistics.lse.shape))
    of = [None if each is None else factor * each[index].to(dtype).unsqueeze(1) for each in upstream]
    log_p = z.sub_(lse.unsqueeze(1)) if tanh is not None or not known else z - lse.unsqueeze(1)
    p = log_p.exp()
    slope = torch.zeros_like(p[:, :1])
    dz = torch.zeros_like(p)
    if of[0] is not None:
        slope = slope - of[0]
    if of[1] is not None:
        assert statistics.entropy is not None
        finite = log_p.masked_fill(p == 0, 0)
        dz -= of[1] * (finite + statistics.entropy[index].unsqueeze(1))
    if of[3] is not None:
        assert statistics.log_sum_sq_probs is not None
        slope = slope - 2 * of[3]
        dz += 2 * of[3] * p / statistics.log_sum_sq_probs[index].exp().unsqueeze(1)
    dz.add_(slope).mul_(p)
    if of[2] is not None:
        dz += of[2] / n_all_classes
    if of[0] is not None:
        dz.scatter_add_(1, safe, of[0].expand(safe.shape) * here.unsqueeze(1))
    if tanh is not None:
        dz.mul_(tanh.square_().neg_().add_(1)).mul_(spec.inner * spec.outer)
    else:
        dz.mul_(spec.inner)
    gradient.copy_(dz.masked_fill_(~valid.unsqueeze(1), 0))


def log_prob_rows(
    logits: Tensor,  # (R, V), unit stride along V
    labels: Tensor,  # (N,) int64
    spec: RowLoss,
    statistics: RowStatistics,
    *,
    rows: Tensor | None = None,  # (R,) int64
    gradient: Tensor | None = None,  # (R, V) out; may be logits
    known: bool = False,
    part: bool = False,
    upstream: RowUpstream | None = None,
    first_class: int = 0,
    n_all_classes: int | None = None,
    class_weights: Tensor | None = None,  # (V,), of all classes
    scale: Tensor | None = None,  # ()
    gradient_scale: float = 1.0,
    use_kernel: bool,
) -> None:
    """Write each row's statistics, or where they are known read them, and write the gradient of its logits.

    Rows whose label is ``ignore_index`` leave the statistics as they are and get a zero gradient; rows whose label lies
    outside [0, V) get NaN. The gradient is that of the statistics under ``upstream`` (None: of the log-probabilities'
    sum) times ``gradient_scale`` and ``scale``. Where the statistics are known, the logits may be those of some of
    ``n_all_classes`` classes, from ``first_class`` on; so they may with ``part``, which writes what
    :class:`RowStatistics` says of parts and takes ``class_weights``, but no gradient.
    """
    if logits.numel() == 0:
        return
    assert not part or (gradient is None and not known)
    n_all_classes = logits.shape[1] if n_all_classes is None else n_all_classes
    if not use_kernel or logits.dtype == torch.float64:
        _log_prob_reference(
            logits,
            labels,
            spec,
            statistics,
            upstream,
            rows=rows,
            gradient=gradient,
            known=known,
            part=part,
            first_class=first_class,
            n_all_classes=n_all_classes,
            class_weights=class_weights,
            scale=scale,
            gradient_scale=gradient_scale,
        )
        return
    n_classes = logits.shape[1]
    block, warps = _tile(n_classes, logits.itemsize, with_gradient=gradient is not None)
    # The kernel reads these with unit stride.
    upstreams = [None if each is None else each.contiguous() for each in upstream or RowUpstream()]
    launch(
        _log_prob_kernel,
        (logits.shape[0], 1, 1),
        (
            logits,
            logits.stride(0),
            gradient,
            0 if gradient is None else gradient.stride(0),
            labels.contiguous(),
            rows,
            None if known else statistics.log_probs,
            *statistics[1:3],
            None if known else statistics.mean_logits,
            statistics.log_sum_sq_probs,
            None if known else statistics.top1,
            *((None, None) if known else statistics[6:]),
            None if class_weights is None else class_weights.contiguous(),
            *upstreams,
            scale,
            n_classes,
            n_all_classes,
            first_class,
            spec.ignore_index,
            spec.inner,
            spec.outer,
            gradient_scale,
        ),
        (spec.outer != 0, known, part, upstream is None, block, 16 // logits.itemsize),
        num_warps=warps,
    )
