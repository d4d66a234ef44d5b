"""LM head and cross entropy without logits, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import CrossEntropyOutput, linear_cross_entropy
from ..kernels.cross_entropy import requested_outputs

__all__ = ["LigerFusedLinearCrossEntropyLoss"]


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """:func:`liger_trainer.kernels.linear_cross_entropy` with its options fixed.

    Mind the order of the call's arguments, which is Liger-Kernel's: the weight comes first.

    Args:
        ce_weight: (V,) class weights, or None.
        ignore_index, label_smoothing, reduction, softcap: as the function's.
        lse_square_scale: the function's ``z_loss``.
        accum_dtype: accepted for compatibility; the weight's gradient always accumulates in fp32.
        use_token_scaling: the function's ``token_scaling``.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a :class:`CrossEntropyOutput` with these.

    Raises:
        ValueError: for an ``accum_dtype`` other than None and ``torch.float32``.
    """

    ce_weight: Tensor | None

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype must be None or torch.float32, which is what is used; got {accum_dtype}")
        self.register_buffer("ce_weight", ce_weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.use_token_scaling = use_token_scaling
        self.outputs = requested_outputs(return_z_loss, return_token_accuracy, return_predicted_tokens)

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (*, H)
        target: Tensor,  # (*)
        bias: Tensor | None = None,  # (V,)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (V, r)
    ) -> Tensor | CrossEntropyOutput:
        """The loss.

        ``low_rank`` is a pair ``a`` (\\*, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the logits, as the
        function's: a LoRA adapter's, ``a`` being the scaled output of its first layer. Both get a gradient.
        """
        return linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            low_rank=low_rank,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            class_weights=self.ce_weight,
            token_scaling=self.use_token_scaling,
            outputs=self.outputs,
        )
