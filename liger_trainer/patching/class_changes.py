"""What a model does to the logits of single classes, done to the head's rows instead.

The logit of class v is ``hidden @ weight[v] + bias[v]``. Times a factor of its own, plus a number of its own, or in its
place a constant, it is the same with another ``weight[v]`` and ``bias[v]``: so a loss that takes a head needs no logits
for that. It costs a copy of the weight, (V, H), where the logits would be (N, V), and the gradients of the head's
weight, of its bias, and of factors and numbers that are learned come out of ordinary differentiation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["ClassChange", "Filled", "Scaled", "Shifted", "chosen_classes", "one_a_class"]


class ClassChange(Protocol):
    """A change of the logits of ``n_classes`` classes, the first of the head's, which are all by then."""

    @property
    def n_classes(self) -> int: ...

    def of_logits(self, logits: Tensor) -> Tensor:
        """Logits (\\*, n_classes), as the model changes them."""
        ...

    def of_rows(
        self, weight: Tensor, bias: Tensor | None, own: slice, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that give changed logits in products of ``compute_dtype``. They are the rows ``own`` of the
        n_classes: all, but for a head that ranks hold together."""
        ...


@dataclass(frozen=True, eq=False)
class _WithNumbers:
    numbers: Tensor  # (V,)
    dtype: torch.dtype  # of the result

    @property
    def n_classes(self) -> int:
        return self.numbers.shape[0]


class Scaled(_WithNumbers):
    """Each class's logit times its number."""

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype) * self.numbers

    def of_rows(
        self, weight: Tensor, bias: Tensor | None, own: slice, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        factors = self.numbers[own]
        return (weight * factors[:, None]).to(weight.dtype), None if bias is None else bias * factors


class Shifted(_WithNumbers):
    """Each class's logit plus its number."""

    def of_logits(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype) + self.numbers

    def of_rows(
        self, weight: Tensor, bias: Tensor | None, own: slice, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        numbers = self.numbers[own]
        return weight, numbers if bias is None else bias + numbers


@dataclass(frozen=True, eq=False)
class Filled:
    """A constant in place of the logits of chosen classes, through which no gradient flows.

    Their rows of the weight become zeros: a token with such a label would send a gradient through them.
    """

    chosen: Tensor  # (V,), bool
    value: float

    @property
    def n_classes(self) -> int:
        return self.chosen.shape[0]

    def of_logits(self, logits: Tensor) -> Tensor:
        beyond = torch.finfo(logits.dtype).max < abs(self.value)
        return logits.masked_fill(self.chosen, math.copysign(math.inf, self.value) if beyond else self.value)

    def of_rows(
        self, weight: Tensor, bias: Tensor | None, own: slice, compute_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        chosen, value = self.chosen[own], self.value
        if math.isfinite(value):  # the least number of fp32 is none of bf16
            bounds = torch.finfo(compute_dtype)
            value = min(max(value, bounds.min), bounds.max)
        if bias is None:
            bias = torch.zeros(weight.shape[0], dtype=compute_dtype, device=weight.device)
        return weight.masked_fill(chosen[:, None], 0), bias.masked_fill(chosen, value)


def one_a_class(values: Any, n_dims: int, n_classes: int) -> bool:
    """Whether ``values`` is a tensor that broadcasts to logits of ``n_dims`` dimensions as a number a class."""
    return (
        isinstance(values, Tensor)
        and 1 <= values.dim() <= n_dims
        and n_classes > 1
        and values.shape[-1] == values.numel() == n_classes
    )


def chosen_classes(index: Any, n_dims: int, n_classes: int, device: torch.device) -> Tensor | None:
    """(V,) which classes an index of logits, ``logits[index]``, selects for every row; None for any other index."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is None or isinstance(item, bool) for item in items):
        return None
    *rows, columns = items
    whole = [item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in rows]
    n_ellipses = sum(item is Ellipsis for item in items)
    if columns is Ellipsis or not all(whole) or n_ellipses > 1 or len(items) - n_ellipses > n_dims:
        return None
    if n_ellipses == 0 and len(items) < n_dims:
        return None
    if isinstance(columns, Tensor) and columns.dim() != 1:
        return None
    chosen = torch.zeros(n_classes, dtype=torch.bool, device=device)
    chosen[columns] = True
    return chosen
