"""SFT, DPO and KTO, which have answers given."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from ..kernels import linear_cross_entropy
from ..patching.counted_labels import count_labels
from .arguments import LigerTRLArguments
from .deferred_head import HeadTensors
from .fused_forward import IGNORED, upper_bound
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
    builds for that. ``compute_loss_func`` and ``return_outputs`` get outputs whose logits are built when something
    reads them, and not where their cross entropy is all that is asked for. One forward serves the loss, the metrics and
    these outputs, where TRL's trainer runs two or three.
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
        several = smooths or return_outputs or self.compute_loss_func is not None
        if not (self.uses_liger_loss and several):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (smooths and "labels" in inputs):
            with self.one_forward(fused_too=True):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = shifted(inputs["labels"])
        counted = count_labels(labels, IGNORED)

        def smoothed(outputs: Any, head: HeadTensors) -> Any:
            head = head.last(labels.shape[1])
            return linear_cross_entropy(
                head.hidden,
                head.weight,
                labels.to(head.hidden.device),
                bias=head.bias,
                low_rank=head.low_rank,
                label_smoothing=smoother.epsilon,
                num_items=num_items_in_batch,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                compute_dtype=head.compute_dtype,
                max_valid=upper_bound(counted),
                tile_bytes=self.memory_options()["tile_bytes"],
            )

        waiting = [smoothed]

        def scored(**kwargs: Any) -> Any:
            if waiting and not kwargs.get("fused_lm_head"):
                return model(**kwargs, logits_to=waiting.pop())
            return model(**kwargs)

        # TRL's code hands the smoother what the model returns, which is the smoothed loss already.
        trainer.label_smoother = lambda loss, labels, **_: loss
        try:
            with self.one_forward(fused_too=True):
                return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)
        finally:
            trainer.label_smoother = smoother


class _BesideReference(LigerLossMixin):
    """What DPO and KTO have in common: a reference whose log-probabilities TRL's ``__init__`` may compute beforehand.

    ``return_outputs`` comes from the forward that the loss is of, with logits that are built when something reads them.
    """

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self.take_over()
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sparing = self.uses_liger_loss and return_outputs
        with self.one_forward(fused_too=False) if sparing else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]


@dataclass
class LigerDPOConfig(LigerTRLArguments, DPOConfig):
    """``trl.DPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerDPOTrainer(_BesideReference, DPOTrainer):
    """``trl.DPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""


@dataclass
class LigerKTOConfig(LigerTRLArguments, KTOConfig):
    """``trl.KTOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerKTOTrainer(_BesideReference, KTOTrainer):
    """``trl.KTOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""
