"""The dtype in which the ops compute and accumulate."""

from __future__ import annotations

import torch

__all__ = ["accumulation_dtype"]


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or float64 where an operand has it."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
