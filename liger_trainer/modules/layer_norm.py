"""LayerNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import layer_norm
from ._initial import initial_weight

__all__ = ["LigerLayerNorm"]


class LigerLayerNorm(nn.Module):
    """:func:`liger_trainer.kernels.layer_norm` over the last dimension, with Liger-Kernel's constructor.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the variance.
        bias: has no effect: as in Liger-Kernel there is a trainable bias either way. It starts at zero (there, a bias
            asked for starts at random).
        init_fn: initial weight, ``"ones"`` or ``"zeros"``.
        impl, mode, backend: have no effect: the implementation is chosen by the device of the input.

    Shapes: (..., H) -> (..., H).

    Raises:
        ValueError: init_fn is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(initial_weight(hidden_size, init_fn))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}"
