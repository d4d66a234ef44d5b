"""SFT, DPO and KTO, which have answers given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from ..kernels import linear_cross_entropy
from .arguments import LigerTRLArguments
from .deferred_head import HeadTensors
from .mixin import LigerLossMixin
from .pairs import shifted

__all__ = [
    "LigerDPOConfig",
    "LigerDPOTrainer",
    "LigerKTOConfig",
    "LigerKTOTrainer",
    "LigerSFTConfig",
    "LigerSFTTrainer",
]


@dataclass
class LigerSFTConfig(LigerTRLArguments, SFTConfig):
    """``trl.SFTConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerSFTTrainer(LigerLossMixin, SFTTrainer):
    """``trl.SFTTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`.

    ``label_smoothing_factor`` is applied inside the fused cross entropy, where TRL's trainer smooths logits that it
    builds for that.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trainer: Any = self
        smoother = trainer.label_smoother
        smooths = smoother is not None and trainer.args.loss_type == "nll" and self.compute_loss_func is None
        if not (self.uses_liger_loss and smooths) or return_outputs or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = shifted(inputs["labels"])

        def smoothed(outputs: Any, head: HeadTensors) -> Any:
            return linear_cross_entropy(
                head.hidden,
                head.weight,
                labels.to(head.hidden.device),
                bias=head.bias,
                label_smoothing=smoother.epsilon,
                num_items=num_items_in_batch,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                compute_dtype=head.compute_dtype,
                tile_bytes=self.memory_options()["tile_bytes"],
            )

        def scored(**kwargs: Any) -> Any:
            return model(**kwargs) if kwargs.get("fused_lm_head") else model(**kwargs, logits_to=smoothed)

        # TRL's code hands the smoother what the model returns, which is the smoothed loss already.
        trainer.label_smoother = lambda loss, labels, **_: loss
        try:
            return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)
        finally:
            trainer.label_smoother = smoother


@dataclass
class LigerDPOConfig(LigerTRLArguments, DPOConfig):
    """``trl.DPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerDPOTrainer(LigerLossMixin, DPOTrainer):
    """``trl.DPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""


@dataclass
class LigerKTOConfig(LigerTRLArguments, KTOConfig):
    """``trl.KTOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerKTOTrainer(LigerLossMixin, KTOTrainer):
    """``trl.KTOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""
