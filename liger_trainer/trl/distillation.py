"""GKD, from ``trl.experimental``: a student learns from a teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.gkd import GKDConfig, GKDTrainer

from ..kernels import linear_jsd
from .arguments import LigerTRLArguments
from .deferred_head import HeadTensors
from .mixin import LigerLossMixin, apply_liger_loss
from .pairs import shifted

__all__ = ["LigerGKDConfig", "LigerGKDTrainer"]


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

        def divergence(outputs: Any, student: HeadTensors) -> Tensor:
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
