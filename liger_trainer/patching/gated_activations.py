"""The activations of gated linear units that a kernel computes, with the ways in which models round them.

:mod:`.mlp` and :mod:`.experts` compare what a model computes with these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from .. import kernels
from .recompute import rebuildable

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """An activation of the gate: ``silu``, or ``gelu`` in its exact or its tanh form.

    Attributes:
        in_float: whether activation and product are in fp32 and rounded once, as in the kernel, or each by itself.
    """

    name: Literal["silu", "gelu"]
    approximate: str = "none"
    in_float: bool = False

    def eager(self, gate: Tensor, up: Tensor) -> Tensor:
        """``activation(gate) * up`` in torch operations, rounding where a model written by hand rounds."""
        dtype = gate.dtype
        if self.in_float:
            gate, up = gate.float(), up.float()
        if self.name == "silu":
            return (nn.functional.silu(gate) * up).to(dtype)
        return (nn.functional.gelu(gate, approximate=self.approximate) * up).to(dtype)

    def fused(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same by the kernel, in fp32 and rounded once."""
        if self.name == "silu":
            return rebuildable(kernels.swiglu(gate, up), kernels.swiglu, gate, up)
        return rebuildable(kernels.geglu(gate, up, self.approximate), kernels.geglu, gate, up, self.approximate)

    def __str__(self) -> str:
        return "swiglu" if self.name == "silu" else f"geglu({self.approximate})"


_BY_HAND = (Activation("silu"), Activation("gelu", "tanh"), Activation("gelu", "none"))
ACTIVATIONS = (*_BY_HAND, *(replace(activation, in_float=True) for activation in _BY_HAND))
