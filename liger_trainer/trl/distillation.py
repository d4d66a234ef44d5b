"""Distillation, and GKD from ``trl.experimental``: a student learns from a teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from ..kernels import linear_jsd
from .arguments import LigerTRLArguments
from .deferred_head import HeadTensors
from .mixin import LigerLossMixin, _causal_lm, _has_adapter_on_head, apply_liger_loss
from .pairs import shifted

__all__ = ["LigerDistillationConfig", "LigerDistillationTrainer", "LigerGKDConfig", "LigerGKDTrainer"]


@dataclass
class LigerGKDConfig(LigerTRLArguments, GKDConfig):
    """``trl.experimental.gkd.GKDConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerGKDTrainer(LigerLossMixin, GKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""

    def replace_loss(self) -> None:
        apply_liger_loss(self)
        self.install_heads(self.teacher_model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.uses_liger_loss or return_outputs:  # the outputs are the logits
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        self.teacher_model.eval()
        with torch.no_grad():
            teacher: HeadTensors = self.teacher_model(**tokens, logits_to=lambda outputs, head: head)
        labels = shifted(inputs["labels"])

        def divergence(outputs: Any, student: HeadTensors) -> Any:
            return linear_jsd(
                student.hidden,
                student.weight,
                teacher.hidden.to(student.hidden.device),
                teacher.weight.to(student.hidden.device),
                beta=self.beta,
                labels=labels,
                num_items=num_items_in_batch,
                student_bias=student.bias,
                teacher_bias=teacher.bias,
                student_logit_scale=student.logit_scale,
                student_softcap=student.softcap,
                teacher_logit_scale=teacher.logit_scale,
                teacher_softcap=teacher.softcap,
                tile_bytes=self.memory_options()["tile_bytes"],
                compute_dtype=student.compute_dtype,
            )

        return model(**tokens, logits_to=divergence)


@dataclass
class LigerDistillationConfig(LigerTRLArguments, DistillationConfig):
    """``trl.DistillationConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerDistillationTrainer(LigerLossMixin, DistillationTrainer):
    """``trl.DistillationTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`.

    TRL's code makes both models' hidden states and hands them to one function with both heads; that is replaced for
    the time of the call.
    """

    def replace_loss(self) -> None:
        """Nothing is installed: the loss is chosen in each forward.

        Raises:
            ValueError: for an adapter on the head, whose weight alone TRL's code hands on.
        """
        if _has_adapter_on_head(_causal_lm(self.model)):
            raise ValueError(
                f"{type(self).__name__} reads the weight of the LM head alone, so that an adapter on it would never be "
                "trained. Take the head out of target_modules, or use LigerGKDTrainer."
            )

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not self.uses_liger_loss:
            return super()._compute_loss(*args, **kwargs)
        original = distillation_trainer._chunked_divergence_loss
        distillation_trainer._chunked_divergence_loss = self._divergence
        try:
            return super()._compute_loss(*args, **kwargs)
        finally:
            distillation_trainer._chunked_divergence_loss = original

    def _divergence(
        self,
        student_hidden_states: Tensor,  # (B, T, Hs)
        teacher_hidden_states: Tensor,  # (B, T, Ht)
        student_lm_head_weight: Tensor,  # (V, Hs)
        teacher_lm_head_weight: Tensor,  # (V, Ht)
        completion_mask: Tensor,  # (B, T)
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the student's entropies, number of tokens), as TRL's ``_chunked_divergence_loss``."""
        valid = completion_mask != 0
        output: Any = linear_jsd(
            student_hidden_states,
            student_lm_head_weight,
            teacher_hidden_states,
            teacher_lm_head_weight,
            beta=beta,
            temperature=temperature,
            labels=torch.where(valid, 0, -100),
            num_items=num_items_in_batch,
            student_bias=student_lm_head_bias,
            teacher_bias=teacher_lm_head_bias,
            student_logit_scale=student_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_final_logit_softcapping,
            tile_bytes=self.memory_options()["tile_bytes"],
            outputs=("student_entropy",),
        )
        return output.loss, output.student_entropy.sum(), valid.sum()
