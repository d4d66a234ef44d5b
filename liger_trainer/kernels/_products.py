"""The matrix products of a head: a tile's logits, and what their gradient adds to the gradients of all that made them.

The logits are ``hidden W^T + bias``, and with a low-rank term (Hu et al., 2021, LoRA, https://arxiv.org/abs/2106.09685)
``+ a B^T``, of hidden states ``a`` (N, r) and a weight ``B`` (V, r) with r far below H. The term is one more product
into the same tile: neither a merged weight ``W + B A`` nor ``[W, B]`` is made, and a frozen W wants no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype, gradient_dtype

__all__ = [
    "NEED_SCHEMA",
    "HeadGradients",
    "LowRank",
    "Need",
    "accumulate_product",
    "accumulate_weight_gradient",
    "any_requires_grad",
    "empty_gradients",
    "fill_logits",
    "flat_low_rank",
    "gradient_dtypes",
    "head_product",
]

NEED_SCHEMA = (
    "bool need_hidden, bool need_weight, bool need_bias, bool need_low_rank_hidden, bool need_low_rank_weight, "
    "ScalarType weight_gradient_dtype"
)


class LowRank(NamedTuple):
    """The low-rank term of the logits."""

    hidden: Tensor  # (N, r)
    weight: Tensor  # (V, r)

    @classmethod
    def of(cls, hidden: Tensor | None, weight: Tensor | None) -> LowRank | None:
        return None if hidden is None or weight is None else cls(hidden, weight)

    def rows(self, index: Tensor | slice | None, dtype: torch.dtype) -> LowRank:
        """That of some rows, or of all for None, whose hidden states have ``dtype``."""
        return self._replace(hidden=_rows(self.hidden, index).to(dtype))


class Need(NamedTuple):
    """Which of a head's tensors want a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low_rank_hidden: bool = False
    low_rank_weight: bool = False

    @classmethod
    def of(cls, needs_input_grad: Sequence[bool]) -> Need:
        """Those of an ``autograd.Function`` over hidden states, weight, labels, bias and the low-rank pair."""
        hidden, weight, _, bias, low_rank_hidden, low_rank_weight = needs_input_grad[:6]
        return cls(hidden, weight, bias, low_rank_hidden, low_rank_weight)

    @property
    def sums_rows(self) -> bool:
        """Whether one of them sums over the rows, whose factors it can't take any more once it is formed."""
        return self.weight or self.bias or self.low_rank_weight


def _rows(x: Tensor, index: Tensor | slice | None) -> Tensor:
    if index is None:
        return x
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def head_product(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,  # of the same R rows
    out: Tensor,  # (R, V)
) -> Tensor:
    """The logits. All tensors have out's dtype."""
    if low_rank is not None:
        # The small term first: it is what is rounded once more, and the large one meets it in fp32.
        head_product(low_rank.hidden, low_rank.weight, bias, None, out)
        return out.addmm_(hidden, weight.t())
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def fill_logits(
    out: Tensor,  # (R, V)
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,  # of the same R rows
    kept: Tensor | None,  # (K, V)
) -> None:
    """Logits of all rows, of which those of the first K are copied and the others multiplied."""
    n_kept = 0 if kept is None else len(kept)
    if kept is not None:
        out[:n_kept].copy_(kept)
    if low_rank is not None:
        low_rank = low_rank._replace(hidden=low_rank.hidden[n_kept:])
    head_product(hidden[n_kept:], weight, bias, low_rank, out[n_kept:])


def accumulate_product(
    total: Tensor,  # (M, N)
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    first: bool,
) -> None:
    """``total (+)= a b``, accumulated inside the product in total's dtype where that is the wider one."""
    if total.numel() == 0:
        return
    if a.dtype == total.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif total.dtype.itemsize < a.dtype.itemsize:
        product = torch.mm(a, b)
        if first:
            total.copy_(product)
        else:
            total.add_(product)
    elif total.is_cuda:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)


def accumulate_weight_gradient(
    total: Tensor,  # (V, H) fp32, or float64; or in one step the gradient itself
    logit_gradient: Tensor,  # (R, V)
    hidden: Tensor,  # (R, H)
    first: bool,
) -> None:
    """``total (+)= logit_gradient^T hidden``."""
    accumulate_product(total, logit_gradient.t(), hidden, first)


def _write_rows(total: Tensor, rows: Tensor | slice, logit_gradient: Tensor, weight: Tensor) -> None:
    if isinstance(rows, slice):
        torch.mm(logit_gradient, weight, out=total[rows])
    else:
        total.index_copy_(0, rows, torch.mm(logit_gradient, weight))


class HeadGradients:
    """What a pass over the tiles accumulates: the gradients of all that makes the logits, where they are needed.

    Those not needed have shape (0,). The hidden states' are in the products' dtype, the bias's and the low-rank
    weight's, which is small, in fp32 or float64.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        low_rank: LowRank | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        every_row: bool,
        need: Need,
    ) -> None:
        self.need = need
        wide = accumulation_dtype(dtype)
        # Every row is written by some tile, or starts as the zeros of a row that none computes.
        make = torch.empty if every_row else torch.zeros
        self.hidden = make(hidden.shape if need.hidden else (0,), dtype=dtype, device=hidden.device)
        self.weight = torch.empty(weight.shape if need.weight else (0,), dtype=weight_dtype, device=hidden.device)
        self.bias = torch.zeros(weight.shape[:1] if need.bias else (0,), dtype=wide, device=hidden.device)
        no_rows = no_classes = torch.Size((0,))
        if low_rank is not None:
            no_rows = low_rank.hidden.shape if need.low_rank_hidden else no_rows
            no_classes = low_rank.weight.shape if need.low_rank_weight else no_classes
        self.low_rank_hidden = make(no_rows, dtype=dtype, device=hidden.device)
        self.low_rank_weight = torch.empty(no_classes, dtype=wide, device=hidden.device)

    def add(
        self,
        logit_gradient: Tensor,  # (R, V)
        hidden: Tensor,  # (R, H)
        weight: Tensor,  # (V, H)
        low_rank: LowRank | None,  # of the same R rows
        rows: Tensor | slice,
        first: bool,
    ) -> None:
        if self.need.hidden:
            _write_rows(self.hidden, rows, logit_gradient, weight)
        if self.need.weight:
            accumulate_weight_gradient(self.weight, logit_gradient, hidden, first)
        if self.need.bias:
            self.bias += logit_gradient.sum(0, dtype=self.bias.dtype)
        if low_rank is not None and self.need.low_rank_hidden:
            _write_rows(self.low_rank_hidden, rows, logit_gradient, low_rank.weight)
        if low_rank is not None and self.need.low_rank_weight:
            accumulate_weight_gradient(self.low_rank_weight, logit_gradient, low_rank.hidden, first)

    def no_rows(self) -> None:
        """Zero what a first tile would have written."""
        self.weight.zero_()
        self.low_rank_weight.zero_()

    def in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the ops return them: in the order of :class:`Need`."""
        return self.hidden, self.weight, self.bias, self.low_rank_hidden, self.low_rank_weight


def gradient_dtypes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
) -> tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None, torch.dtype | None]:
    """The dtypes that the gradients are handed back in; None for what is not there."""
    return (
        hidden.dtype,
        gradient_dtype(weight),
        None if bias is None else bias.dtype,
        None if low_rank_hidden is None else low_rank_hidden.dtype,
        None if low_rank_weight is None else gradient_dtype(low_rank_weight),
    )


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def flat_low_rank(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """(N, r) and (V, r) as the ops take them, of hidden states of any leading dimensions."""
    return (None, None) if pair is None else (pair[0].reshape(-1, pair[0].shape[-1]), pair[1])


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    low_rank_hidden: Tensor | None,
    low_rank_weight: Tensor | None,
    compute_dtype: torch.dtype,
    need: Any,  # the values of a Need
    weight_gradient_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """:meth:`HeadGradients.in_order` for the ops' fake implementations."""
    wide = accumulation_dtype(compute_dtype)
    low_rank = tuple((0,) if each is None else each.shape for each in (low_rank_hidden, low_rank_weight))
    shapes = (hidden.shape, weight.shape, weight.shape[:1], *low_rank)
    dtypes = (compute_dtype, weight_gradient_dtype, wide, compute_dtype, wide)
    return tuple(
        hidden.new_empty(shape if needed else (0,), dtype=dtype) for shape, needed, dtype in zip(shapes, need, dtypes)
    )
