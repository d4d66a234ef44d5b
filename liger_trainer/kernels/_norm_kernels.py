"""Triton kernels of the norms over rows: :mod:`.rms_norm`, :mod:`.add_rms_norm`, :mod:`.layer_norm`.

RMSNorm is LayerNorm without the mean and the bias, so that one set of kernels serves both: with ``n`` the normalised
row and ``g`` the gradient that reaches it, ``dx = rstd * (g - n * mean(g * n) [- mean(g)])``. With a residual the row
is ``total = x + residual``, rounded, and ``dx`` has the gradient that reaches total from elsewhere added to it.

A row up to ``_FORWARD_LIMIT`` (``_BACKWARD_LIMIT``) elements is read once and kept in registers; wider rows are read
block by block, twice.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ._launch import launch
from ._rows import as_rows, empty_in_order, memory_order, multiprocessors
from ._triton import tl, triton

__all__ = ["normalize", "normalize_backward"]

_FORWARD_LIMIT = 32768
_BACKWARD_LIMIT = 16384  # the backward holds three rows in registers: x, dy and the sum for dW
_WIDE_BLOCK = 4096
_WARPS_PER_PROCESSOR = 16  # of the backward, by its registers; each program more also means a partial sum of dW more
_TILES_OF_ONE_PROGRAM = 4  # looping over so few takes no longer than another launch that adds up partial sums
_SUM_TILE = 32, 128, 4  # columns, rows and warps of a program that adds up partial sums


@lru_cache
def _tile(width: int, limit: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of one program's tile: narrow rows share a program, wide rows are looped over."""
    columns = triton.next_power_of_2(max(width, 16))
    if columns > limit:
        return _WIDE_BLOCK, 1, 8
    rows = max(1, 2048 // columns)
    most_warps = 16 if torch.version.hip else 32
    return columns, rows, min(max(columns * rows // 512, 1), most_warps)


def _programs(tiles: int, warps: int, device: torch.device) -> int:
    """How many programs of the backward share the tiles of rows."""
    if tiles <= _TILES_OF_ONE_PROGRAM:
        return 1
    return min(tiles, max(1, _WARPS_PER_PROCESSOR // warps) * multiprocessors(device))


@triton.jit
def _scale(weight, OFFSET: tl.constexpr, CASTING: tl.constexpr):
    """offset + weight in fp32, rounded to the weight's dtype first where "llama" adds in that dtype."""
    if OFFSET == 0.0:
        return weight.to(tl.float32)
    elif CASTING == "llama":
        return (weight.to(tl.float32) + OFFSET).to(weight.dtype).to(tl.float32)
    else:
        return weight.to(tl.float32) + OFFSET


@triton.jit
def _load_rows(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    total_ptr,
    rows,
    columns,
    mask,
    WIDTH: tl.constexpr,
    STORE: tl.constexpr,
):
    """Rows of x in fp32 or, with a residual, of x + residual, rounded to total's dtype and stored there if told so."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        if STORE:
            tl.store(total_ptr + rows[:, None] * WIDTH + columns[None, :], total, mask=mask)
        x = total.to(tl.float32)
    return x


@triton.jit
def _finish(normalized, scale, shift, CASTING: tl.constexpr, ROW_DTYPE: tl.constexpr):
    """y in fp32 from normalised rows (ROWS, BLOCK) in fp32; scale and shift (BLOCK,) may be None."""
    y = normalized
    if CASTING == "llama":
        y = y.to(ROW_DTYPE).to(tl.float32)
    if scale is not None:
        y = y * scale[None, :]
    if shift is not None:
        y = y + shift[None, :]
    return y


@triton.jit
def _finish_block(
    normalized,
    weight_ptr,
    bias_ptr,
    columns,
    in_row,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    ROW_DTYPE: tl.constexpr,
):
    """As :func:`_finish`, with scale and shift loaded here: a loop can't carry what is None for some norms."""
    scale = None
    shift = None
    if weight_ptr is not None:
        scale = _scale(tl.load(weight_ptr + columns, mask=in_row, other=0.0), OFFSET, CASTING)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    return _finish(normalized, scale, shift, CASTING, ROW_DTYPE)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    weight_ptr,
    bias_ptr,
    total_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    eps,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    y_rows = y_ptr + rows[:, None] * WIDTH
    row_dtype: tl.constexpr = x_ptr.dtype.element_ty if total_ptr is None else total_ptr.dtype.element_ty
    y_dtype: tl.constexpr = y_ptr.dtype.element_ty

    if WIDTH <= BLOCK:
        columns = tl.arange(0, BLOCK)
        in_row = columns < WIDTH
        mask = live[:, None] & in_row[None, :]
        x = _load_rows(x_ptr, x_stride, residual_ptr, residual_stride, total_ptr, rows, columns, mask, WIDTH, True)
        # Before the sums, so that these loads are under way as well.
        scale = None
        shift = None
        if weight_ptr is not None:
            scale = _scale(tl.load(weight_ptr + columns, mask=in_row, other=0.0), OFFSET, CASTING)
        if bias_ptr is not None:
            shift = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            mean = tl.sum(x, axis=1) / WIDTH
            tl.store(mean_ptr + rows, mean, mask=live)
            x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        y = _finish(x * rstd[:, None], scale, shift, CASTING, row_dtype)
        tl.store(y_rows + columns[None, :], y.to(y_dtype), mask=mask)
    else:
        mean = tl.zeros((ROWS,), tl.float32)
        if mean_ptr is not None:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, WIDTH, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                mask = live[:, None] & (columns < WIDTH)[None, :]
                total += _load_rows(
                    x_ptr, x_stride, residual_ptr, residual_stride, total_ptr, rows, columns, mask, WIDTH, False
                )
            mean = tl.sum(total, axis=1) / WIDTH
            tl.store(mean_ptr + rows, mean, mask=live)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = live[:, None] & (columns < WIDTH)[None, :]
            x = _load_rows(x_ptr, x_stride, residual_ptr, residual_stride, total_ptr, rows, columns, mask, WIDTH, False)
            x = tl.where(mask, x - mean[:, None], 0.0)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + eps)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            in_row = columns < WIDTH
            mask = live[:, None] & in_row[None, :]
            x = _load_rows(x_ptr, x_stride, residual_ptr, residual_stride, total_ptr, rows, columns, mask, WIDTH, True)
            normalized = (x - mean[:, None]) * rstd[:, None]
            y = _finish_block(normalized, weight_ptr, bias_ptr, columns, in_row, OFFSET, CASTING, row_dtype)
            tl.store(y_rows + columns[None, :], y.to(y_dtype), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=live)


@triton.jit
def _load_statistic(ptr, rows, live):
    """One statistic a row, (ROWS,), zeros where there is none."""
    if ptr is None:
        return tl.zeros(rows.shape, tl.float32)
    else:
        return tl.load(ptr + rows, mask=live, other=0.0)


@triton.jit
def _load_for_backward(dy_ptr, dy_stride, x_ptr, x_stride, mean_ptr, rstd_ptr, rows, columns, live, mask):
    """x and dy (ROWS, BLOCK) in their dtypes, rstd and mean (ROWS,) of rows."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
    return x, dy, rstd, _load_statistic(mean_ptr, rows, live)


@triton.jit
def _store_share(share, sum_ptr, partials_ptr, columns, in_row, WIDTH: tl.constexpr):
    """This program's share of dW or db (BLOCK,), to (programs, WIDTH) partial sums; the only program's is the sum."""
    if tl.num_programs(0) == 1:
        tl.store(sum_ptr + columns, share.to(sum_ptr.dtype.element_ty), mask=in_row)
    else:
        tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * WIDTH + columns, share, mask=in_row)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    dy_ptr,
    dy_stride,
    x_ptr,
    x_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dtotal_ptr,
    dtotal_stride,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    partials_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx, and this program's share of dW and db, over the rows that it strides through."""
    program = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    columns = tl.arange(0, BLOCK)
    in_row = columns < WIDTH
    # The next rows are on their way while these are worked on, as long as the registers hold both.
    prefetch: tl.constexpr = BLOCK <= 8192
    if weight_ptr is not None and prefetch:
        scale = _scale(tl.load(weight_ptr + columns, mask=in_row, other=0.0), OFFSET, CASTING)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)

    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    mask = live[:, None] & in_row[None, :]
    if prefetch:
        next_x, next_dy, next_rstd, next_mean = _load_for_backward(
            dy_ptr, dy_stride, x_ptr, x_stride, mean_ptr, rstd_ptr, rows, columns, live, mask
        )
    for _ in range(program * ROWS, n_rows, step):
        if prefetch:
            x, dy, rstd, mean = next_x, next_dy, next_rstd, next_mean
        else:
            x, dy, rstd, mean = _load_for_backward(
                dy_ptr, dy_stride, x_ptr, x_stride, mean_ptr, rstd_ptr, rows, columns, live, mask
            )
            if weight_ptr is not None:
                scale = _scale(tl.load(weight_ptr + columns, mask=in_row, other=0.0), OFFSET, CASTING)[None, :]
        x, dy, rstd, mean = x.to(tl.float32), dy.to(tl.float32), rstd[:, None], mean[:, None]
        if dtotal_ptr is not None:
            dtotal = tl.load(dtotal_ptr + rows[:, None] * dtotal_stride + columns[None, :], mask=mask, other=0.0)
        dx_ptrs = dx_ptr + rows[:, None] * WIDTH + columns[None, :]
        stored = mask
        rows += step
        live = rows < n_rows
        mask = live[:, None] & in_row[None, :]
        if prefetch:
            next_x, next_dy, next_rstd, next_mean = _load_for_backward(
                dy_ptr, dy_stride, x_ptr, x_stride, mean_ptr, rstd_ptr, rows, columns, live, mask
            )

        # Columns past the row need no mask: dy is 0 there.
        normalized = (x - mean) * rstd
        g = dy
        if weight_ptr is not None:
            g = dy * scale
        if dweight_ptr is not None:
            if CASTING == "llama":
                dweight += dy * normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
            else:
                dweight += dy * normalized
        if dbias_ptr is not None:
            dbias += dy
        dx = g - normalized * (tl.sum(g * normalized, axis=1) / WIDTH)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / WIDTH)[:, None]
        dx *= rstd
        if dtotal_ptr is not None:
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=stored)

    if dweight_ptr is not None:
        _store_share(tl.sum(dweight, axis=0), dweight_ptr, partials_ptr, columns, in_row, WIDTH)
        partials_ptr += tl.num_programs(0).to(tl.int64) * WIDTH
    if dbias_ptr is not None:
        _store_share(tl.sum(dbias, axis=0), dbias_ptr, partials_ptr, columns, in_row, WIDTH)


@triton.jit(do_not_specialize=["n_rows"])
def _wide_means_kernel(
    dy_ptr,
    dy_stride,
    x_ptr,
    x_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean(g * n) and mean(g) of each wide row, (2, n_rows)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    gn = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        mask = start + columns < WIDTH
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * dy_stride + start + columns, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= _scale(tl.load(weight_ptr + start + columns, mask=mask, other=0.0), OFFSET, CASTING)
        gn += g * (x - mean) * rstd
        total += g
    tl.store(means_ptr + row, tl.sum(gn, axis=0) / WIDTH)
    tl.store(means_ptr + n_rows.to(tl.int64) + row, tl.sum(total, axis=0) / WIDTH)


@triton.jit(do_not_specialize=["n_rows"])
def _wide_backward_kernel(
    dy_ptr,
    dy_stride,
    x_ptr,
    x_stride,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dtotal_ptr,
    dtotal_stride,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    partials_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`_backward_kernel` on one block of columns, with the means over whole rows given."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    if weight_ptr is not None:
        scale = _scale(tl.load(weight_ptr + columns, mask=mask, other=0.0), OFFSET, CASTING)
    row = program.to(tl.int64)
    for _ in range(program, n_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row)
        normalized = x * rstd
        g = dy
        if weight_ptr is not None:
            g = dy * scale
        dx = g - normalized * tl.load(means_ptr + row)
        if mean_ptr is not None:
            dx -= tl.load(means_ptr + n_rows.to(tl.int64) + row)
        dx *= rstd
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * dtotal_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * WIDTH + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if CASTING == "llama":
            normalized = normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
        dweight += dy * normalized
        dbias += dy
        row += tl.num_programs(0)
    if dweight_ptr is not None:
        _store_share(dweight, dweight_ptr, partials_ptr, columns, mask, WIDTH)
        partials_ptr += tl.num_programs(0).to(tl.int64) * WIDTH
    if dbias_ptr is not None:
        _store_share(dbias, dbias_ptr, partials_ptr, columns, mask, WIDTH)


@triton.jit
def _column_sum(partials_ptr, sum_ptr, n_partials, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    mask = columns < WIDTH
    total = tl.zeros((ROWS, columns.shape[0]), tl.float32)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.load(partials_ptr + tile, mask=(rows < n_partials)[:, None] & mask[None, :], other=0.0)
    tl.store(sum_ptr + columns, tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, n_partials, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """dW and db, where wanted, from (n_partials, WIDTH) partial sums of each, in fp32, one after the other."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if dweight_ptr is not None:
        _column_sum(partials_ptr, dweight_ptr, n_partials, columns, WIDTH, ROWS)
        partials_ptr += n_partials.to(tl.int64) * WIDTH
    if dbias_ptr is not None:
        _column_sum(partials_ptr, dbias_ptr, n_partials, columns, WIDTH, ROWS)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
    *,
    centered: bool,
    offset: float = 0.0,
    casting: str = "none",
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, mean or None, rstd): y of x's shape and memory order, the statistics of its leading shape in fp32.

    With a residual of x's shape, x + residual is normalised, and written into total, dense in x's memory order.
    """
    order = memory_order(x)
    y = empty_in_order(x, order, y_dtype)
    rstd = empty_in_order(x, order, torch.float32, per_row=True)
    mean = empty_in_order(x, order, torch.float32, per_row=True) if centered else None
    if not x.numel():
        return y, mean if mean is None else mean.zero_(), rstd.zero_()
    width = x.shape[-1]
    x, stride = as_rows(x, order)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual, order)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    n_rows = x.numel() // width
    block, rows, warps = _tile(width, _FORWARD_LIMIT)
    launch(
        _forward_kernel,
        ((n_rows + rows - 1) // rows, 1, 1),
        (x, stride, residual, residual_stride, weight, bias, total, y, mean, rstd, n_rows, eps),
        (width, offset, casting, block, rows),
        num_warps=warps,
    )
    return y, mean, rstd


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    *,
    offset: float = 0.0,
    casting: str = "none",
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias): dx in x's dtype and memory order, the others in the dtype given, None without one.

    dtotal, of x's shape, is added to dx.
    """
    width = x.shape[-1]
    order = memory_order(x)
    dx = empty_in_order(x, order, x.dtype)
    dweight = None if dweight_dtype is None else torch.empty(width, dtype=dweight_dtype, device=x.device)
    dbias = None if dbias_dtype is None else torch.empty(width, dtype=dbias_dtype, device=x.device)
    if not x.numel():
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()

    if order is not None:  # no copies: the forward made the statistics in this order
        rstd = rstd.permute(order).contiguous()
        mean = None if mean is None else mean.permute(order).contiguous()
    x, x_stride = as_rows(x, order)
    dy, dy_stride = as_rows(dy, order)
    dtotal, dtotal_stride = (None, 0) if dtotal is None else as_rows(dtotal, order)
    weight = None if weight is None else weight.contiguous()
    n_rows = x.numel() // width
    block, rows, warps = _tile(width, _BACKWARD_LIMIT)
    programs = _programs((n_rows + rows - 1) // rows, warps, x.device)
    n_sums = 0 if programs == 1 else (dweight is not None) + (dbias is not None)
    # Without partial sums any tensor in fp32 will do: nothing is written to it, and the kernel stays the same.
    partials = torch.empty(n_sums * programs * width, dtype=torch.float32, device=x.device) if n_sums else rstd
    rows_of = (dy, dy_stride, x, x_stride, weight, mean, rstd)
    if width <= block:
        launch(
            _backward_kernel,
            (programs, 1, 1),
            (*rows_of, dtotal, dtotal_stride, dx, dweight, dbias, partials, n_rows),
            (width, offset, casting, block, rows),
            num_warps=warps,
        )
    else:
        means = torch.empty((2, n_rows), dtype=torch.float32, device=x.device)
        constants = width, offset, casting, block
        launch(_wide_means_kernel, (n_rows, 1, 1), (*rows_of, means, n_rows), constants, num_warps=warps)
        launch(
            _wide_backward_kernel,
            (programs, (width + block - 1) // block, 1),
            (*rows_of, means, dtotal, dtotal_stride, dx, dweight, dbias, partials, n_rows),
            constants,
            num_warps=warps,
        )
    if n_sums:
        columns, sum_rows, sum_warps = _SUM_TILE
        launch(
            _sum_partials_kernel,
            ((width + columns - 1) // columns, 1, 1),
            (partials, dweight, dbias, programs),
            (width, columns, sum_rows),
            num_warps=sum_warps,
        )
    return dx, dweight, dbias
