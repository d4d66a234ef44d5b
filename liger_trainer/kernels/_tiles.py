"""The engine under every loss that ends in the language-model head: rows, or classes, in tiles.

Hidden states (N, H) meet the head's weight (V, H) a tile of rows at a time, so that no tensor of N * V elements ever
exists. What a loss does with a tile of logits is its own business; choosing the rows is here, once, and multiplying and
accumulating in :mod:`._products`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype
from ._launch import launch
from ._products import (
    HeadGradients,
    LowRank,
    Need,
    accumulate_product,
    accumulate_weight_gradient,
    fill_logits,
    head_product,
)
from ._rows import multiprocessors
from ._triton import tl, triton

__all__ = [
    "Kept",
    "least_tile_bytes",
    "partition_rows",
    "plan",
    "run_class_tiles",
    "run_tiles",
    "scaled",
    "tiles",
    "without_autocast",
]

_TILE_BYTES = 512 * 2**20
_SMALL_TILE_BYTES = 256 * 2**20
_LEAST_TILE_BYTES = 128 * 2**20


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The products choose their own dtypes; an active autocast would choose again."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def plan(
    n_rows: int,
    shape: tuple[int, int],  # (V, H), the weight's
    dtype: torch.dtype,
    weight_gradient_dtype: torch.dtype | None,
    tile_bytes: int | None,
    n_heads: int = 1,
) -> tuple[int, bool]:
    """(bytes of a tile, whether one tile is to hold all rows), for products in ``dtype``.

    ``n_heads`` is how many tiles of logits exist at a time; together they take ``tile_bytes``.

    A gradient of the weight that is rounded in the end accumulates over tiles in a wider buffer, of which every tile
    reads and writes the whole: few and large tiles are fastest. Up to the size of the rounded gradient they cost
    nothing, since once they are freed buffer and gradient exist together. And where the logits of all rows take no more
    than all that, one product makes that gradient from them, accumulated and rounded in its registers.
    """
    itemsize = dtype.itemsize
    accumulated = accumulation_dtype(dtype).itemsize
    if weight_gradient_dtype is None or weight_gradient_dtype.itemsize >= accumulated:
        return (_TILE_BYTES if tile_bytes is None else tile_bytes) // n_heads, False
    numel = shape[0] * shape[1]
    gradient_bytes = numel * weight_gradient_dtype.itemsize
    if tile_bytes is None:
        tile_bytes = max(gradient_bytes, _SMALL_TILE_BYTES)
    most = numel * accumulated + max(gradient_bytes, tile_bytes)
    return tile_bytes // n_heads, n_heads * n_rows * shape[0] * itemsize + gradient_bytes <= most


def least_tile_bytes(weight_gradient_bytes: int = 0) -> int:
    """Bytes of a tile where memory matters most.

    A pass before that which makes the weight's gradient may take as much as that will, for larger products.
    """
    return max(_LEAST_TILE_BYTES, min(_TILE_BYTES, weight_gradient_bytes))


def tiles(n_rows: int, n_classes: int, itemsize: int, tile_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut n_rows into ranges of nearly equal length whose logits fit in tile_bytes (one row at the least)."""
    most = max(1, tile_bytes // (n_classes * itemsize))
    # The matrix products are at their best on whole multiples of their own tiles, some percent faster than between.
    unit = 256 if most >= 1024 else 64 if most >= 64 else 1
    n_units = -(-n_rows // unit)
    n_tiles = -(-n_units // (most // unit))
    start = 0
    for tile in range(n_tiles):
        end = min(n_rows, -(-n_units * (tile + 1) // n_tiles) * unit)  # none is longer than the first
        yield start, end
        start = end


@triton.jit(do_not_specialize=["n_rows"])
def _partition_kernel(labels_ptr, rows_ptr, count_ptr, n_rows, ignore_index, BLOCK: tl.constexpr):
    valid_before = n_rows * 0
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        mask = rows < n_rows
        valid = (tl.load(labels_ptr + rows, mask=mask, other=ignore_index) != ignore_index).to(tl.int32)
        # Valid rows fill the front in their order, ignored ones the back in reverse.
        valid_index = valid_before + tl.cumsum(valid, 0) - valid
        position = tl.where(valid != 0, valid_index, n_rows - 1 - (rows - valid_index))
        tl.store(rows_ptr + position, rows.to(tl.int64), mask=mask)
        valid_before += tl.sum(valid, 0)
    tl.store(count_ptr, valid_before)


def partition_rows(
    labels: Tensor,  # (N,)
    ignore_index: int,
    max_valid: int | None,
    use_kernel: bool,
) -> tuple[Tensor | None, int]:
    """A permutation of the rows that puts those with a label first, and how many of them to compute.

    Without ``max_valid``, an upper bound of the labels that are not ignored, the host waits for the device's count.
    The permutation is None where every row is to be computed.
    """
    n = labels.shape[0]
    if n == 0 or (max_valid is not None and max_valid >= n):
        return None, n
    if use_kernel:
        labels = labels.contiguous()
        rows = labels.new_empty(n)
        count = labels.new_empty((), dtype=torch.int32)
        launch(_partition_kernel, (1, 1, 1), (labels, rows, count, n, ignore_index), (1024,), num_warps=8)
    else:
        ignored = labels == ignore_index
        rows = ignored.to(torch.int8).argsort(stable=True)
        count = n - ignored.sum()
    n_valid = int(count) if max_valid is None else max_valid
    return (None, n) if n_valid == n else (rows, n_valid)


@triton.jit
def _scaled_kernel(
    x_ptr,
    scale_ptr,
    row_scale_ptr,
    row_stride,
    out_ptr,
    n_elements,
    row_length,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.full((), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    n_blocks = tl.cdiv(n_elements, BLOCK)
    if IN_PLACE and row_scale_ptr is None:
        n_blocks = tl.where(scale == 1.0, 0, n_blocks)
    length = tl.full((), BLOCK, tl.int64)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        offsets = block * length + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32) * scale
        if row_scale_ptr is not None:
            x *= tl.load(row_scale_ptr + offsets // row_length * row_stride, mask=mask).to(tl.float32)
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


def scaled(
    x: Tensor,  # (R, C), contiguous
    scale: Tensor | None,  # ()
    dtype: torch.dtype,
    row_scale: Tensor | None,  # (R,)
    in_place: bool,
    use_kernel: bool,
) -> Tensor:
    """``x * scale * row_scale[:, None]`` in fp32, rounded once to dtype; over x itself where its dtype allows it.

    In place, a ``scale`` that turns out to be 1 on the device costs no pass over x.
    """
    in_place = in_place and x.dtype == dtype
    out = x if in_place else torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out
    if use_kernel and x.dtype != torch.float64:
        block = 4096
        programs = triton.cdiv(x.numel(), block)
        if in_place:
            programs = min(programs, 8 * multiprocessors(x.device))
        launch(
            _scaled_kernel,
            (programs, 1, 1),
            (
                x,
                scale,
                row_scale,
                0 if row_scale is None else row_scale.stride(0),
                out,
                x.numel(),
                x.shape[-1],
            ),
            (in_place, block),
            num_warps=8,
        )
        return out
    x = x.to(accumulation_dtype(x.dtype))
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).unsqueeze(1)
    return out.copy_(x if scale is None else x * scale.to(x.dtype))


class Kept(NamedTuple):
    """Logits of the first rows that a pass leaves for the pass after it."""

    logits: Tensor  # (K, V), of the products' dtype
    known: bool  # whether they are there already, else they are written
    overwrite: bool = False  # whether their gradient may take their place


def run_tiles(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,
    on_tile: Callable[[Tensor, Tensor | None, Tensor | None], None],
    *,
    rows: Tensor | None,  # (N,)
    n_valid: int,
    compute_dtype: torch.dtype,
    weight_gradient_dtype: torch.dtype,
    tile_bytes: int | None,
    need: Need,
    kept: Kept | None = None,
    n_heads: int = 1,
    plan_classes: int | None = None,
) -> HeadGradients:
    """Make logits a tile at a time, for the first ``n_valid`` rows of the permutation ``rows``, or for all in order.

    ``on_tile(logits, row_index, gradient)`` gets (R, V) logits, the (R,) rows that they belong to (None: all N in their
    order), and where a gradient is needed the buffer to write that of the logits to, which is the logits' own unless
    they were ``kept`` and must not be overwritten. ``n_heads`` is how many tiles of logits, this one included, are to
    share ``tile_bytes``. ``plan_classes`` cuts the tiles as for a head of so many classes, at least V: ranks that
    share a head meet at every tile, and must cut alike.
    """
    n_classes = weight.shape[0]
    plan_classes = n_classes if plan_classes is None else plan_classes
    tile_bytes, at_once = plan(
        n_valid,
        (plan_classes, weight.shape[1]),
        compute_dtype,
        weight_gradient_dtype if need.weight else None,
        tile_bytes,
        n_heads,
    )
    weight = weight.to(compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    if low_rank is not None:
        low_rank = low_rank._replace(weight=low_rank.weight.to(compute_dtype))
    every_row = rows is None and n_valid == len(hidden)
    n_kept = 0 if kept is None else min(len(kept.logits), n_valid)
    at_once = at_once or n_kept == n_valid
    if at_once:
        ranges = [(0, n_valid)] if n_valid else []
    else:
        ranges = [(0, n_kept)] if n_kept else []  # what is kept is one tile of its own
        cut = tiles(n_valid - n_kept, plan_classes, compute_dtype.itemsize, tile_bytes)
        ranges += [(n_kept + start, n_kept + end) for start, end in cut]
    weight_dtype = weight_gradient_dtype if at_once else accumulation_dtype(compute_dtype)
    gradients = HeadGradients(hidden, weight, low_rank, compute_dtype, weight_dtype, every_row, need)
    buffer: Tensor | None = None
    logits: Tensor | None = None
    gradient: Tensor | None = None
    for start, end in ranges:
        where: Tensor | slice
        row_index: Tensor | None
        if rows is None:
            where, x = slice(start, end), hidden[start:end]
            whole = start == 0 and end == len(hidden)
            row_index = None if whole else torch.arange(start, end, device=hidden.device)
        else:
            where = row_index = rows[start:end]
            x = hidden.index_select(0, row_index)
        x = x.to(compute_dtype)
        low_rank_tile = None if low_rank is None else low_rank.rows(where, compute_dtype)
        known = kept is not None and kept.known and start < n_kept
        if kept is not None and end <= n_kept:
            logits = kept.logits[:n_kept]
            if not known:
                head_product(x, weight, bias, low_rank_tile, logits)
        else:
            if buffer is None:
                buffer = torch.empty((end - start, n_classes), dtype=compute_dtype, device=hidden.device)
            logits = buffer[: end - start]
            at_hand = kept.logits[:n_kept] if kept is not None and known else None
            fill_logits(logits, x, weight, bias, low_rank_tile, at_hand)
        if any(need):
            own = kept is not None and known and end <= n_kept and not kept.overwrite
            gradient = torch.empty_like(logits) if own else logits
        on_tile(logits, row_index, gradient)
        if gradient is not None:
            gradients.add(gradient, x, weight, low_rank_tile, where, first=start == 0)
    if not ranges:
        gradients.no_rows()
    logits = gradient = buffer = None  # freed before the gradient is rounded, which takes new memory
    if need.weight:
        gradients.weight = gradients.weight.to(weight_gradient_dtype)
    return gradients


def run_class_tiles(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,
    on_tile: Callable[[Tensor, Tensor | None, Tensor, int], None],
    *,
    rows: Tensor | None,  # (N,)
    n_valid: int,
    compute_dtype: torch.dtype,
    weight_gradient_dtype: torch.dtype,
    tile_bytes: int | None,
    need: Need,
    kept: Tensor | None = None,  # (K, V)
) -> HeadGradients:
    """As :func:`run_tiles`, with tiles of all rows and some classes, for losses that know their log-sum-exp.

    A class meets all rows in one product, so its part of the weight's gradient is rounded in that product's registers
    and written once: no wider buffer of the weight's size is needed. The hidden states' gradient accumulates over the
    tiles instead, in fp32 (float64).

    ``on_tile(logits, row_index, gradient, first_class)`` gets (R, C) logits of C classes from ``first_class`` on.
    ``kept`` holds the logits of the first K rows, which are read and left as they are.
    """
    n_classes = weight.shape[0]
    tile_bytes = _LEAST_TILE_BYTES if tile_bytes is None else tile_bytes
    wide = accumulation_dtype(compute_dtype)
    gradients = HeadGradients(hidden, weight, low_rank, compute_dtype, weight_gradient_dtype, False, need)
    row_index: Tensor | None = None
    if rows is not None:
        row_index = rows[:n_valid]
    elif n_valid < len(hidden):
        row_index = torch.arange(n_valid, device=hidden.device)
    x = (hidden if row_index is None else hidden.index_select(0, row_index)).to(compute_dtype)
    make = torch.empty if n_classes else torch.zeros
    total = make(x.shape if need.hidden else (0,), dtype=wide, device=hidden.device)
    part: LowRank | None = None
    low_rank_total = total.new_empty(0)
    if low_rank is not None:
        low_rank = low_rank.rows(row_index, compute_dtype)
        low_rank_total = make(low_rank.hidden.shape if need.low_rank_hidden else (0,), dtype=wide, device=hidden.device)
    buffer: Tensor | None = None
    for start, end in tiles(n_classes, n_valid, compute_dtype.itemsize, tile_bytes) if n_valid else ():
        if buffer is None:
            buffer = torch.empty((end - start) * n_valid, dtype=compute_dtype, device=hidden.device)
        logits = buffer[: (end - start) * n_valid].view(n_valid, end - start)
        classes = weight[start:end].to(compute_dtype)
        class_bias = None if bias is None else bias[start:end].to(compute_dtype)
        if low_rank is not None:
            part = low_rank._replace(weight=low_rank.weight[start:end].to(compute_dtype))
        fill_logits(logits, x, classes, class_bias, part, None if kept is None else kept[:, start:end])
        on_tile(logits, row_index, logits, start)
        if need.hidden:
            accumulate_product(total, logits, classes, first=start == 0)
        if need.weight:
            accumulate_weight_gradient(gradients.weight[start:end], logits, x, first=True)
        if need.bias:
            gradients.bias[start:end] = logits.sum(0, dtype=wide)
        if part is not None and need.low_rank_hidden:
            accumulate_product(low_rank_total, logits, part.weight, first=start == 0)
        if part is not None and need.low_rank_weight:
            accumulate_weight_gradient(gradients.low_rank_weight[start:end], logits, part.hidden, first=True)
    buffer = None
    if not n_valid:
        gradients.no_rows()
        return gradients
    for needed, gradient, wider in (
        (need.hidden, gradients.hidden, total),
        (need.low_rank_hidden, gradients.low_rank_hidden, low_rank_total),
    ):
        if needed and row_index is None:
            gradient.copy_(wider)
        elif needed and row_index is not None:
            gradient.index_copy_(0, row_index, wider.to(compute_dtype))
    return gradients
