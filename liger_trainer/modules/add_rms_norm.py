"""Residual addition and RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import add_rms_norm
from ._initial import initial_weight

__all__ = ["LigerFusedAddRMSNorm"]


class LigerFusedAddRMSNorm(nn.Module):
    """:func:`liger_trainer.kernels.add_rms_norm` over the last dimension, with Liger-Kernel's constructor.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; Gemma's norms have 1.0, with ``casting_mode="gemma"`` and ``init_fn="zeros"``.
        casting_mode: ``"llama"``, ``"gemma"`` or ``"none"``, see :func:`liger_trainer.kernels.rms_norm`.
        init_fn: initial weight, ``"ones"`` or ``"zeros"``.
        in_place: has no effect: inputs and incoming gradients are never overwritten.

    Shapes: hidden_states (..., H) and residual of the same shape -> the norm of their sum and the sum, (..., H) both.

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
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_weight(hidden_size, init_fn))
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            hidden_states, residual, self.weight, self.variance_epsilon, offset=self.offset, casting=self.casting_mode
        )

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}, "
            f"casting_mode={self.casting_mode!r}"
        )
