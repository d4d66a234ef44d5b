"""The activations of gated linear units that a kernel computes, with the ways in which models round them.

:mod:`.mlp` and :mod:`.experts` compare what a model computes with these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .. import kernels
from .recompute import rebuildable

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """An activation of the gate: ``silu``, or ``gelu`` in its exact or its tanh form.

    Attributes:
        in_float: whether activation and product are in fp32 and rounded once, as in the kernel, or each by itself.
        written_out: whether GELU's tanh form is in single operations, each of which rounds (T5 1.1).
    """

    name: Literal["silu", "gelu"]
    approximate: str = "none"
    in_float: bool = False
    written_out: bool = False

    def eager(self, gate: Tensor, up: Tensor) -> Tensor:
        """``activation(gate) * up`` in torch operations, rounding where a model written by hand rounds."""
        dtype = gate.dtype
        if self.in_float:
            gate, up = gate.float(), up.float()
        if self.name == "silu":
            return (nn.functional.silu(gate) * up).to(dtype)
        if self.written_out:
            inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))
            return (0.5 * gate * (1.0 + torch.tanh(inner)) * up).to(dtype)
        return (nn.functional.gelu(gate, approximate=self.approximate) * up).to(dtype)

    def fused(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same by the kernel, in fp32 and rounded once."""
        if self.name == "silu":
            return rebuildable(kernels.swiglu(gate, up), kernels.swiglu, gate, up)
        return rebuildable(kernels.geglu(gate, up, self.approximate), kernels.geglu, gate, up, self.approximate)

    def __str__(self) -> str:
        return "swiglu" if self.name == "silu" else f"geglu({self.approximate})"


_BY_HAND = (Activation("silu"), Activation("gelu", "tanh"), Activation("gelu", "none"))
ACTIVATIONS = (
    *_BY_HAND,
    *(replace(activation, in_float=True) for activation in _BY_HAND),
    Activation("gelu", "tanh", written_out=True),
)
