"""What happens to all logits alike on their way to the loss: casts, scaling, a soft-cap, and which of them are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Transform", "split_index"]


@dataclass(frozen=True)
class Transform:
    """What happened to the logits: ``inner * l``, or ``outer * tanh(inner * l)`` once capped; then a cast.

    ``n_classes`` counts the columns left of the head's. No field is called ``dtype``: accelerate takes what has
    one for a tensor.
    """

    cast_to: torch.dtype
    n_classes: int
    inner: float = 1.0
    outer: float = 1.0
    capped: bool = False
    gathered: bool = False  # asked for as a whole by the hook of a tensor-parallel head

    def times(self, factor: float) -> Transform:
        if self.capped:
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits[..., : self.n_classes].to(self.cast_to)
        if self.inner != 1:
            logits = logits * self.inner
        if self.capped:
            logits = torch.tanh(logits) * self.outer
        return logits

    def loss_options(self) -> dict[str, Any]:
        if self.capped:
            return {"softcap": self.outer, "logit_scale": self.inner * self.outer}
        return {"logit_scale": self.inner}


def split_index(items: tuple[Any, ...], n_dims: int) -> tuple[tuple[Any, ...] | None, slice | None]:
    """The part of an index that selects rows, and the slice of leading columns; (None, None) for any other index."""
    ellipses = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1 or any(item is None or isinstance(item, bool) for item in items):
        return None, None
    spans = [item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in items]
    missing = n_dims - (sum(spans) - len(ellipses))
    if missing < 0:
        return None, None
    at = ellipses[0] if ellipses else len(items)
    rows = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    last = rows.pop()
    if not isinstance(last, slice) or last.step not in (None, 1) or last.start not in (None, 0):
        return None, None
    return tuple(rows), None if last.stop is None else last
