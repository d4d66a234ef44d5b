"""Tensors as rows: the last dimension is a row, all others count rows, whatever order they have in memory.

Row-wise kernels address row r at ``pointer + r * row_stride`` with unit stride inside the row. Since rows do not depend
on each other, a transposed tensor (say the (B, H, S, D) view of (B, S, H, D) memory) needs no copy: its rows are taken
in the order of its memory, and outputs are laid out in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "as_matrix",
    "as_rows",
    "autocasts_to_float32",
    "empty_in_order",
    "from_rows",
    "memory_order",
    "multiprocessors",
]


def memory_order(x: Tensor) -> list[int] | None:
    """The leading dimensions of x in the order of its memory, outermost first; None where they lie in it already."""
    if x.is_contiguous():
        return None
    leading = range(x.dim() - 1)
    proper = [dim for dim in leading if x.shape[dim] != 1]  # the stride of a dimension of size 1 means nothing
    ordered = sorted(proper, key=x.stride, reverse=True)
    if ordered == proper:
        return None
    return [dim for dim in leading if x.shape[dim] == 1] + ordered


def as_rows(x: Tensor, order: Sequence[int] | None) -> tuple[Tensor, int]:
    """A tensor over x's rows taken in ``order`` (of :func:`memory_order`) and the stride between two rows.

    x's own memory where one row stride describes it, else a copy. x must not be empty.
    """
    if order is None and x.is_contiguous():
        return x, x.shape[-1]
    rows = as_matrix(x, order)
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def as_matrix(x: Tensor, order: Sequence[int] | None) -> Tensor:
    """x's rows taken in ``order`` as one (rows, width) tensor: a view where the memory allows one, else a copy."""
    if order is not None:
        x = x.permute(*order, -1)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def from_rows(rows: Tensor, x: Tensor, order: Sequence[int] | None) -> Tensor:
    """The inverse of :func:`as_matrix`: a view of rows, (rows, ...), with x's leading dimensions for the first."""
    if order is None:
        return rows.view((*x.shape[:-1], *rows.shape[1:]))
    dims = [*order, *range(len(order), len(order) + rows.dim() - 1)]
    ordered = rows.view(*(x.shape[dim] for dim in order), *rows.shape[1:])
    return ordered.permute(sorted(range(len(dims)), key=dims.__getitem__))


def empty_in_order(x: Tensor, order: Sequence[int] | None, dtype: torch.dtype, *, per_row: bool = False) -> Tensor:
    """A dense uninitialised tensor of x's shape, without its last dimension for ``per_row``, its rows in ``order``."""
    if order is None:
        if per_row:
            return torch.empty(x.shape[:-1], dtype=dtype, device=x.device)
        # Half of the host time of torch.empty.
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    n_rows = math.prod(x.shape[:-1])
    rows = torch.empty((n_rows,) if per_row else (n_rows, x.shape[-1]), dtype=dtype, device=x.device)
    return from_rows(rows, x, order)


# Which norms autocast runs in fp32 depends on the device and on PyTorch's version: layer_norm everywhere but on the
# CPU, rms_norm in newer ones only.
_AUTOCAST_TO_FLOAT32 = {
    (op, device)
    for op in ("layer_norm", "rms_norm")
    for device in ("cuda", "xpu")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{device.upper()}")
}


def autocasts_to_float32(x: Tensor, op: str) -> bool:
    """Whether autocast would cast x for PyTorch's ``op``, ``"layer_norm"`` or ``"rms_norm"``, here and now."""
    device = x.device.type
    return (
        (op, device) in _AUTOCAST_TO_FLOAT32
        and torch.is_autocast_enabled(device)
        and x.dtype in (torch.bfloat16, torch.float16)
    )


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The number of processors (SM, CU, Xe core) over which a persistent kernel spreads its programs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1
