"""Cross entropy over logits as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels import CrossEntropyOutput, cross_entropy
from ..kernels.cross_entropy import requested_outputs

__all__ = ["LigerCrossEntropyLoss"]


class LigerCrossEntropyLoss(nn.Module):
    """:func:`liger_trainer.kernels.cross_entropy` with its options fixed.

    Args:
        weight: (V,) class weights, or None.
        ignore_index, label_smoothing, reduction, softcap: as the function's.
        lse_square_scale: the function's ``z_loss``.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a :class:`CrossEntropyOutput` with these.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.outputs = requested_outputs(return_z_loss, return_token_accuracy, return_predicted_tokens)

    def forward(
        self,
        _input: Tensor,  # (*, V)
        target: Tensor,  # (*)
    ) -> Tensor | CrossEntropyOutput:
        return cross_entropy(
            _input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            softcap=self.softcap,
            weight=self.weight,
            outputs=self.outputs,
        )
