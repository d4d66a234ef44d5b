"""What the benchmarks of losses behind a language-model head share: the time of the bare matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .measure import event_times

__all__ = ["head_products", "products_ms"]


def head_products(hidden: Tensor, weight: Tensor, *, trained: bool = True) -> Callable[[], None]:
    """The products of a head, forward and backward, in one tile; the weight's gradient in fp32 where it is trained."""
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=hidden.device) if trained else None

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if d_weight is None:
            return
        if hidden.is_cuda:
            torch.mm(logits.t(), hidden, out_dtype=torch.float32, out=d_weight)
        else:
            torch.mm(logits.t().float(), hidden.float(), out=d_weight)

    return products


def products_ms(*parts: Callable[[], None], device: torch.device, budget_ms: float) -> float:
    """Milliseconds of the parts one after another."""

    def run() -> None:
        for part in parts:
            part()

    for _ in range(2):
        run()
    return event_times(run, device, budget_ms=budget_ms).median
