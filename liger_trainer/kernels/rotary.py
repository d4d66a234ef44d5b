"""Rotary position embedding of queries and keys (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ._checks import check_floating, check_same_device
from ._dtypes import accumulation_dtype
from ._launch import launch
from ._library import define, define_differentiable, refuse_double_backward
from ._triton import tl, triton

__all__ = ["rotary"]

_TILE = 2048  # pairs


@triton.jit
def _rotate_heads(
    x_ptr,
    x_head_stride,
    y_ptr,
    y_head_stride,
    cos1,
    sin1,
    cos2,
    sin2,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Rotate every head of one token, HEADS at a time: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pairs = tl.arange(0, BLOCK)[None, :]
    for start in range(0, N_HEADS, HEADS):
        heads = (start + tl.arange(0, HEADS))[:, None]
        live = heads < N_HEADS
        x_heads = x_ptr + heads.to(tl.int64) * x_head_stride
        y_heads = y_ptr + heads.to(tl.int64) * y_head_stride
        if INTERLEAVED:
            # One wide load, split in registers; two loads of every other element would halve each transaction.
            columns = tl.arange(0, 2 * BLOCK)[None, :]
            mask = live & (columns < 2 * PAIRS)
            x = tl.load(x_heads + columns, mask=mask, other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))
            y = tl.join(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2)
            tl.store(y_heads + columns, tl.reshape(y, (HEADS, 2 * BLOCK)).to(dtype), mask=mask)
        else:
            mask = live & (pairs < PAIRS)
            x1 = tl.load(x_heads + pairs, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x_heads + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_heads + pairs, (x1 * cos1 - x2 * sin1).to(dtype), mask=mask)
            tl.store(y_heads + PAIRS + pairs, (x2 * cos2 + x1 * sin2).to(dtype), mask=mask)
        if HEAD_DIM > 2 * PAIRS:
            columns = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
            mask = live & (columns < HEAD_DIM)
            tl.store(y_heads + columns, tl.load(x_heads + columns, mask=mask, other=0.0).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _rotary_triton(
    q_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_ptr,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    cos_ptr,
    sin_ptr,
    cos_batch_stride,
    cos_token_stride,
    new_q_ptr,
    new_k_ptr,
    n_tokens,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    BACKWARD: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // n_tokens).to(tl.int64)
    token = (program % n_tokens).to(tl.int64)

    pairs = tl.arange(0, BLOCK)[None, :]
    mask = pairs < PAIRS
    first = pairs
    second = pairs
    if not PER_PAIR:
        if INTERLEAVED:
            first = 2 * pairs
            second = 2 * pairs + 1
        else:
            second = PAIRS + pairs
    cos_row = cos_ptr + batch * cos_batch_stride + token * cos_token_stride
    sin_row = sin_ptr + batch * cos_batch_stride + token * cos_token_stride
    cos1 = tl.load(cos_row + first, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_row + first, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_row + second, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_row + second, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed 2 x 2 matrix of each pair
        transposed = -sin2
        sin2 = -sin1
        sin1 = transposed

    if TOKEN_MAJOR:  # (B, S, H, D)
        new_q = new_q_ptr + (batch * n_tokens + token) * (Q_HEADS * HEAD_DIM)
        new_k = new_k_ptr + (batch * n_tokens + token) * (K_HEADS * HEAD_DIM)
        new_head_stride = HEAD_DIM
    else:  # (B, H, S, D)
        new_q = new_q_ptr + (batch * n_tokens * Q_HEADS + token) * HEAD_DIM
        new_k = new_k_ptr + (batch * n_tokens * K_HEADS + token) * HEAD_DIM
        new_head_stride = n_tokens * HEAD_DIM
    q = q_ptr + batch * q_batch_stride + token * q_token_stride
    k = k_ptr + batch * k_batch_stride + token * k_token_stride
    _rotate_heads(
        q, q_head_stride, new_q, new_head_stride, cos1, sin1, cos2, sin2,
        Q_HEADS, HEAD_DIM, PAIRS, INTERLEAVED, Q_TILE, BLOCK, REST_BLOCK,
    )  # fmt: skip
    _rotate_heads(
        k, k_head_stride, new_k, new_head_stride, cos1, sin1, cos2, sin2,
        K_HEADS, HEAD_DIM, PAIRS, INTERLEAVED, K_TILE, BLOCK, REST_BLOCK,
    )  # fmt: skip


@lru_cache
def _tiles(q_heads: int, k_heads: int, head_dim: int, pairs: int) -> tuple[int, int, int, int, int]:
    """(heads of q, heads of k, columns of pairs, columns of the rest, warps) of the tiles of one token."""
    block = triton.next_power_of_2(max(pairs, 16))
    rest = triton.next_power_of_2(max(head_dim - 2 * pairs, 16))
    most = max(1, _TILE // block)
    q_tile = min(triton.next_power_of_2(q_heads), most)
    k_tile = min(triton.next_power_of_2(max(k_heads, 1)), most)
    return q_tile, k_tile, block, rest, min(max(max(q_tile, k_tile) * block // 512, 1), 8)


def _head_dim_index(heads_first: bool) -> tuple[int, int]:
    """(dimension of the heads, dimension of the tokens)."""
    return (1, 2) if heads_first else (2, 1)


def _empty(x: Tensor, heads_first: bool, token_major: bool, dtype: torch.dtype) -> Tensor:
    """A dense tensor of x's shape over (B, S, H, D) memory for token_major, else over (B, H, S, D) memory."""
    if token_major != heads_first:  # the memory's order is the order of the dimensions
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _reference(
    backward: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    heads_first: bool,
    token_major: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width = cos.shape[-1] * (2 if per_pair else 1)
    first, second = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (
        slice(0, width // 2), slice(width // 2, width)
    )  # fmt: skip
    table_dtype = accumulation_dtype(q.dtype, k.dtype, q_dtype, k_dtype)
    table = [t.to(table_dtype).unsqueeze(1 if heads_first else 2) for t in (cos, sin)]
    (cos1, cos2), (sin1, sin2) = ((t, t) if per_pair else (t[..., first], t[..., second]) for t in table)
    if backward:
        sin1, sin2 = -sin2, -sin1

    def rotate(x: Tensor, dtype: torch.dtype) -> Tensor:
        x1, x2 = x[..., first].to(cos1.dtype), x[..., second].to(cos1.dtype)
        y = _empty(x, heads_first, token_major, dtype)
        y[..., first] = x1 * cos1 - x2 * sin1
        y[..., second] = x2 * cos2 + x1 * sin2
        y[..., width:] = x[..., width:]
        return y

    return rotate(q, q_dtype), rotate(k, k_dtype)


def _kernel(
    backward: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    heads_first: bool,
    token_major: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (q.dtype, k.dtype, q_dtype, k_dtype):
        return _reference(backward, q, k, cos, sin, interleaved, per_pair, heads_first, token_major, q_dtype, k_dtype)
    new_q = _empty(q, heads_first, token_major, q_dtype)
    new_k = _empty(k, heads_first, token_major, k_dtype)
    heads, tokens = _head_dim_index(heads_first)
    batch, n_tokens, q_heads, k_heads, head_dim = (
        q.shape[0],
        q.shape[tokens],
        q.shape[heads],
        k.shape[heads],
        q.shape[3],
    )
    if batch * n_tokens == 0:
        return new_q, new_k
    q_strides, k_strides, cos_strides = q.stride(), k.stride(), cos.stride()
    if q_strides[3] != 1:
        q = q.contiguous()
        q_strides = q.stride()
    if k_strides[3] != 1:
        k = k.contiguous()
        k_strides = k.stride()
    if cos_strides[2] != 1 or cos_strides != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
        cos_strides = cos.stride()
    pairs = cos.shape[2] if per_pair else cos.shape[2] // 2
    q_tile, k_tile, block, rest, warps = _tiles(q_heads, k_heads, head_dim, pairs)
    launch(
        _rotary_triton,
        (batch * n_tokens, 1, 1),
        (
            q, q_strides[0], q_strides[tokens], q_strides[heads],
            k, k_strides[0], k_strides[tokens], k_strides[heads],
            cos, sin, 0 if cos.shape[0] == 1 else cos_strides[0], cos_strides[1],
            new_q, new_k, n_tokens,
        ),
        (
            q_heads, k_heads, head_dim, pairs, interleaved, per_pair, token_major, backward,
            q_tile, k_tile, block, rest,
        ),
        num_warps=warps,
    )  # fmt: skip
    return new_q, new_k


def _fake(
    backward: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    heads_first: bool,
    token_major: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _empty(q, heads_first, token_major, q_dtype), _empty(k, heads_first, token_major, k_dtype)


def _define(name: str, backward: bool) -> Any:
    """Forward and backward are one computation: the backward rotates the gradients by the transposed matrices."""
    return define(
        f"{name}(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool per_pair, bool heads_first,"
        " bool token_major, ScalarType q_dtype, ScalarType k_dtype) -> (Tensor, Tensor)",
        kernel=partial(_kernel, backward),
        reference=partial(_reference, backward),
        fake=partial(_fake, backward),
    )


_forward = _define("rotary_forward", backward=False)
_backward = _define("rotary_backward", backward=True)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        *layout, q_dtype, k_dtype = options
        ctx.options = (*layout, q.dtype, k.dtype)
        return _forward(q, k, cos, sin, *layout, q_dtype, k_dtype)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("rotary")
        cos, sin = ctx.saved_tensors
        dq, dk = _backward(dq, dk, cos, sin, *ctx.options)
        return dq, dk, None, None, *(None,) * len(ctx.options)


def _differentiable(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    heads_first: bool,
    keep_dtype: bool,
) -> tuple[Tensor, Tensor]:
    heads, tokens = _head_dim_index(heads_first)
    token_major = q.stride(heads) <= q.stride(tokens)
    q_dtype, k_dtype = q.dtype, k.dtype
    if not keep_dtype:
        table_dtype = torch.promote_types(cos.dtype, sin.dtype)
        q_dtype, k_dtype = torch.promote_types(q_dtype, table_dtype), torch.promote_types(k_dtype, table_dtype)
    run = _Rotary.apply if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) else _forward
    return run(q, k, cos, sin, interleaved, per_pair, heads_first, token_major, q_dtype, k_dtype)


_rotary = define_differentiable(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool per_pair, bool heads_first,"
    " bool keep_dtype) -> (Tensor, Tensor)",
    _differentiable,
)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, per_pair: bool, unsqueeze_dim: int) -> None:
    check_floating(q=q, k=k, cos=cos, sin=sin)
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1, for (B, H, S, D), or 2, for (B, S, H, D), got {unsqueeze_dim}")
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
    tokens = 3 - unsqueeze_dim
    if q.shape[0] != k.shape[0] or q.shape[tokens] != k.shape[tokens] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q and k may differ in their number of heads, and in nothing else of their shapes; got "
            f"{tuple(q.shape)} and {tuple(k.shape)} with the heads in dimension {unsqueeze_dim}"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have the same shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if cos.dim() != 3 or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[tokens]:
        raise ValueError(
            f"cos and sin must have shape (1 or {q.shape[0]}, {q.shape[tokens]}, R), got {tuple(cos.shape)}"
        )
    width = 2 * cos.shape[2] if per_pair else cos.shape[2]
    if width % 2 or not 0 < width <= q.shape[3]:
        raise ValueError(
            f"cos and sin must rotate an even number of elements of a head, at most its {q.shape[3]}; they have "
            f"{cos.shape[2]} columns, for {width} elements with per_pair={per_pair}"
        )
    check_same_device(q.device, k=k, cos=cos, sin=sin)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin get no gradient: detach them, or rotate with PyTorch where they are learned")


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    per_pair: bool = False,
    keep_dtype: bool = False,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotate the first R elements of each head of q and k by their token's angles; the rest passes through.

    Elements (x1, x2) of a pair become ``(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)``. Pair i of the R / 2 pairs is

    - elements i and i + R / 2 with ``interleaved=False`` (Llama, Qwen, Gemma, Phi-3, gpt-oss, ...),
    - elements 2 i and 2 i + 1 with ``interleaved=True`` (Cohere, GLM, ERNIE 4.5, Helium, ...);

    and (cos1, cos2), like (sin1, sin2), are

    - with ``per_pair=False``, the columns of cos that belong to these two elements: cos has R columns in the order of
      the head's elements, as Llama (``cat((freqs, freqs))``) and Cohere (``repeat_interleave(freqs, 2)``) make it. The
      two columns of a pair may hold different values;
    - with ``per_pair=True``, both the column i: cos has R / 2 columns, as in gpt-oss. GLM, ERNIE 4.5 and Helium make R
      columns and read the first half of them: pass ``cos[..., : R // 2]``, which copies nothing. For a complex table of
      frequencies (Llama 4) pass its real and imaginary parts.

    Products and sums are in fp32 (fp64 with fp64 inputs), rounded once.

    Args:
        q: (B, Hq, S, D), or (B, S, Hq, D) with ``unsqueeze_dim=2``; any floating point dtype, any strides.
        k: the same with Hk heads; with none, as ``q.narrow(unsqueeze_dim, 0, 0)``, where there is but one to rotate.
        cos: (B or 1, S, R), or (B or 1, S, R / 2) with ``per_pair``; R even and at most D. It may be expanded over B.
        sin: like cos.
        interleaved: see above.
        per_pair: see above.
        keep_dtype: results in q's and k's dtypes. By default they are in the dtype promoted from theirs and that of cos
            and sin, which is what ``q * cos`` gives: fp32 for bf16 q with fp32 cos.
        unsqueeze_dim: the dimension of the heads, 1 or 2.

    Returns:
        The rotated q and k, new tensors in the shapes given and, both, in q's memory order (a transposed view of
        (B, S, H, D) memory gives such a view, and so do the gradients). Differentiable once in q and k.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: shapes or devices do not match, unsqueeze_dim is neither 1 nor 2, or cos or sin requires a gradient,
            which it would not get.
    """
    _check(q, k, cos, sin, per_pair, unsqueeze_dim)
    return _rotary(q, k, cos, sin, interleaved, per_pair, unsqueeze_dim == 1, keep_dtype)
