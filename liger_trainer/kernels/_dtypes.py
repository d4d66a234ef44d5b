"""The dtypes in which the ops compute and accumulate, and in which they hand gradients back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "gradient_dtype"]


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or float64 where an operand has it."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x's gradient: ``x.grad_dtype`` where a leaf has one of its own, else x's."""
    return (getattr(x, "grad_dtype", None) if x.is_leaf else None) or x.dtype
