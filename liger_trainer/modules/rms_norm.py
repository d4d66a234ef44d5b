"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import rms_norm
from ._initial import initial_weight

__all__ = ["LigerRMSNorm"]


class LigerRMSNorm(nn.Module):
    """:func:`liger_trainer.kernels.rms_norm` over the last dimension, with Liger-Kernel's constructor.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; Gemma's norms have 1.0, with ``casting_mode="gemma"`` and ``init_fn="zeros"``.
        casting_mode: ``"llama"``, ``"gemma"`` or ``"none"``, see the function.
        init_fn: initial weight, ``"ones"`` or ``"zeros"``.
        in_place: has no effect: inputs and incoming gradients are never overwritten.
        row_mode: has no effect: the tile is chosen by the width of a row.
        elementwise_affine: False for a norm without a weight.

    Shapes: (..., H) -> (..., H).

    Raises:
        ValueError: init_fn is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        weight = initial_weight(hidden_size, init_fn)
        self.weight = nn.Parameter(weight) if elementwise_affine else None
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode
        self.elementwise_affine = elementwise_affine

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(
            hidden_states, self.weight, self.variance_epsilon, offset=self.offset, casting=self.casting_mode
        )

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, casting_mode={self.casting_mode!r}"
