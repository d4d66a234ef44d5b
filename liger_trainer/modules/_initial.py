"""Initial weights of the norms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["initial_weight"]

_INITIAL = {"ones": torch.ones, "zeros": torch.zeros}


def initial_weight(hidden_size: int, init_fn: str) -> Tensor:
    if init_fn not in _INITIAL:
        raise ValueError(f"init_fn must be one of {tuple(_INITIAL)}, got {init_fn!r}")
    return _INITIAL[init_fn](hidden_size)
