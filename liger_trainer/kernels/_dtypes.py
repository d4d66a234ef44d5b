"""The dtypes in which the ops compute and accumulate, and in which they hand gradients back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "gradient_dtype", "products_dtype"]


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or float64 where an operand has it."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x's gradient: ``x.grad_dtype`` where a leaf has one of its own, else x's."""
    return (getattr(x, "grad_dtype", None) if x.is_leaf else None) or x.dtype


def products_dtype(hidden: Tensor, weight: Tensor, compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a head's products: ``compute_dtype``, else autocast's, else the one that both operands have.

    Raises:
        TypeError: for a ``compute_dtype`` that is not floating point, or operands of two dtypes outside of autocast.
    """
    device_type = hidden.device.type
    if compute_dtype is not None:
        if not compute_dtype.is_floating_point:
            raise TypeError(f"compute_dtype must be a floating point dtype, got {compute_dtype}")
        return compute_dtype
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype} outside of autocast, got {weight.dtype}")
    return hidden.dtype
