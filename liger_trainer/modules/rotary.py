"""The rotary embedding under Liger-Kernel's name."""

from __future__ import annotations

from torch import Tensor

from ..kernels import rotary

__all__ = ["liger_rotary_pos_emb"]


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by halves, as transformers' ``apply_rotary_pos_emb`` does; q and k themselves are left untouched.

    Args:
        q: (B, Hq, S, D), or (B, S, Hq, D) with ``unsqueeze_dim=2``.
        k: the same with Hk heads.
        cos: (B or 1, S, R); only the first R elements of a head are rotated.
        sin: like cos.
        position_ids: has no effect: cos and sin hold the positions' values already.
        unsqueeze_dim: the dimension of the heads, 1 or 2.
        rotary_dim: R, for cos and sin of width R / 2 that hold one value a pair (gpt-oss). None: their width is R.

    Returns:
        The rotated q and k, in the dtype that ``q * cos`` has.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: shapes or devices do not match, or rotary_dim is neither the width of cos nor twice it.
    """
    width = cos.shape[-1]
    if rotary_dim not in (None, width, 2 * width):
        raise ValueError(f"rotary_dim must be the width of cos, {width}, or twice it; got {rotary_dim}")
    return rotary(q, k, cos, sin, per_pair=rotary_dim == 2 * width, unsqueeze_dim=unsqueeze_dim)
