"""Gated linear units' activation, ``act(gate) * up`` (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_floating, check_same_device
from ._dtypes import accumulation_dtype
from ._launch import launch
from ._library import define, define_differentiable, refuse_double_backward
from ._rows import as_matrix, as_rows, empty_in_order, from_rows, memory_order
from ._triton import tl, triton

__all__ = ["geglu", "swiglu"]

_GELU = {"tanh": "gelu_tanh", "none": "gelu"}  # F.gelu's approximate -> the op's activation
_APPROXIMATE = {activation: approximate for approximate, activation in _GELU.items()}
_TILE = 1024


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """(act(gate), act'(gate)) in fp32; what is not used costs nothing."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), here with 2 z = sqrt(8 / pi) (gate + 0.044715 gate³).
        squared = gate * gate
        sigmoid = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * squared))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * squared)
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid) * inner)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        normal_cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        normal_pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * normal_cdf, normal_cdf + gate * normal_pdf


@triton.jit
def _tile_of_program(n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(rows in int64, columns, mask) of this program's tile."""
    n_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (program % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None], columns[None, :], (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]


@triton.jit(do_not_specialize=["n_rows"])
def _forward_triton(
    gate_ptr,
    gate_stride,
    up_ptr,
    up_stride,
    y_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, columns, mask = _tile_of_program(n_rows, WIDTH, BLOCK, ROWS)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activation(gate, ACTIVATION)
    tl.store(y_ptr + rows * WIDTH + columns, (activated * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_triton(
    dy_ptr,
    dy_stride,
    gate_ptr,
    gate_stride,
    up_ptr,
    up_stride,
    dgate_ptr,
    dup_ptr,
    n_rows,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, columns, mask = _tile_of_program(n_rows, WIDTH, BLOCK, ROWS)
    dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activation(gate, ACTIVATION)
    tl.store(dgate_ptr + rows * WIDTH + columns, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + rows * WIDTH + columns, (dy * activated).to(dup_ptr.dtype.element_ty), mask=mask)


@lru_cache
def _tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, programs a band of rows) of the tile of one program."""
    block = min(triton.next_power_of_2(max(width, 16)), _TILE)
    return block, _TILE // block, (width + block - 1) // block


def _forward_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    dtype = accumulation_dtype(gate.dtype, up.dtype)
    order = memory_order(gate)
    gate_rows = as_matrix(gate, order).to(dtype)
    if activation == "silu":
        activated = F.silu(gate_rows)
    else:
        activated = F.gelu(gate_rows, approximate=_APPROXIMATE[activation])
    y = (activated * as_matrix(up, order)).to(torch.promote_types(gate.dtype, up.dtype))
    return from_rows(y, gate, order)


def _backward_reference(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(gate.dtype, up.dtype)
    order = memory_order(gate)
    gate_rows = as_matrix(gate, order).to(dtype)
    dy = as_matrix(dy, order).to(dtype)
    dactivated = dy * as_matrix(up, order)
    if activation == "silu":
        activated = F.silu(gate_rows)
        dgate = torch.ops.aten.silu_backward(dactivated, gate_rows)
    else:
        approximate = _APPROXIMATE[activation]
        activated = F.gelu(gate_rows, approximate=approximate)
        dgate = torch.ops.aten.gelu_backward(dactivated, gate_rows, approximate=approximate)
    dup = dy * activated
    return from_rows(dgate.to(gate.dtype), gate, order), from_rows(dup.to(up.dtype), gate, order)


def _forward_kernel(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    if dtype == torch.float64:
        return _forward_reference(gate, up, activation)
    order = memory_order(gate)
    y = empty_in_order(gate, order, dtype)
    if gate.numel() == 0:
        return y
    gate, gate_stride = as_rows(gate, order)
    up, up_stride = as_rows(up, order)
    width = gate.shape[-1]
    n_rows = gate.numel() // width
    block, rows, n_blocks = _tile(width)
    launch(
        _forward_triton,
        ((n_rows + rows - 1) // rows * n_blocks, 1, 1),
        (gate, gate_stride, up, up_stride, y, n_rows),
        (width, activation, block, rows),
        num_warps=4,
    )
    return y


def _backward_kernel(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if accumulation_dtype(gate.dtype, up.dtype) == torch.float64:
        return _backward_reference(dy, gate, up, activation)
    order = memory_order(gate)
    dgate = empty_in_order(gate, order, gate.dtype)
    dup = empty_in_order(gate, order, up.dtype)
    if gate.numel() == 0:
        return dgate, dup
    dy, dy_stride = as_rows(dy, order)
    gate, gate_stride = as_rows(gate, order)
    up, up_stride = as_rows(up, order)
    width = gate.shape[-1]
    n_rows = gate.numel() // width
    block, rows, n_blocks = _tile(width)
    launch(
        _backward_triton,
        ((n_rows + rows - 1) // rows * n_blocks, 1, 1),
        (dy, dy_stride, gate, gate_stride, up, up_stride, dgate, dup, n_rows),
        (width, activation, block, rows),
        num_warps=4,
    )
    return dgate, dup


def _forward_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return empty_in_order(gate, memory_order(gate), torch.promote_types(gate.dtype, up.dtype))


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    order = memory_order(gate)
    return empty_in_order(gate, order, gate.dtype), empty_in_order(gate, order, up.dtype)


_forward = define(
    "gated_activation_forward(Tensor gate, Tensor up, str activation) -> Tensor",
    kernel=_forward_kernel,
    reference=_forward_reference,
    fake=_forward_fake,
)
_backward = define(
    "gated_activation_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("swiglu" if ctx.activation == "silu" else "geglu")
        gate, up = ctx.saved_tensors
        dgate, dup = _backward(dy, gate, up, ctx.activation)
        return dgate, dup, None


def _differentiable(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedActivation.apply(gate, up, activation)
    return _forward(gate, up, activation)


_gated_activation = define_differentiable(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor", _differentiable
)


def _check(gate: Tensor, up: Tensor) -> None:
    check_floating(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have the same shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.dim() == 0:
        raise ValueError("gate and up must have at least one dimension, got scalars")
    check_same_device(gate.device, up=up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in fp32 and rounded once.

    Args:
        gate: (..., I), any floating point dtype, any strides. The two halves of a fused projection
            (``gate, up = x.chunk(2, dim=-1)``) are read in place.
        up: (..., I); its dtype may differ from the gate's.

    Returns:
        (..., I) in the dtype promoted from both, a new tensor in the gate's memory order. It is differentiable once.

    Raises:
        TypeError: gate or up is not floating point.
        ValueError: their shapes or devices differ.
    """
    _check(gate, up)
    return _gated_activation(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """``gelu(gate) * up``, computed in fp32 and rounded once.

    Args:
        gate: (..., I), any floating point dtype, any strides. The two halves of a fused projection
            (``gate, up = x.chunk(2, dim=-1)``) are read in place.
        up: (..., I); its dtype may differ from the gate's.
        approximate: as in ``F.gelu``: ``"tanh"`` (what Gemma uses), or ``"none"`` for the exact GELU by the error
            function.

    Returns:
        (..., I) in the dtype promoted from both, a new tensor in the gate's memory order. It is differentiable once.

    Raises:
        TypeError: gate or up is not floating point.
        ValueError: their shapes or devices differ, or approximate is unknown.
    """
    _check(gate, up)
    if approximate not in _GELU:
        raise ValueError(f"approximate must be one of {tuple(_GELU)}, got {approximate!r}")
    return _gated_activation(gate, up, _GELU[approximate])
