"""Distillation, and GKD from ``trl.experimental``: a student learns from a teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from ..kernels import linear_jsd
from ..patching.adapters import is_plain, serving_module
from ..patching.counted_labels import count_labels
from .affine_head import product
from .arguments import LigerTRLArguments
from .deferred_head import HeadTensors, check_head
from .fused_forward import IGNORED, upper_bound
from .mixin import LigerLossMixin, _causal_lm, apply_liger_loss
from .pairs import shifted

__all__ = ["LigerDistillationConfig", "LigerDistillationTrainer", "LigerGKDConfig", "LigerGKDTrainer"]


def _refuse_least_memory(trainer: LigerLossMixin) -> None:
    if trainer.memory_options()["least_memory"]:
        raise ValueError(
            f"{type(trainer).__name__} has no least-memory mode: its gradients are formed in the forward, which tiles "
            "rows. Set least_memory=False, and tile_bytes in liger_config for small tiles."
        )


@dataclass
class LigerGKDConfig(LigerTRLArguments, GKDConfig):
    """``trl.experimental.gkd.GKDConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerGKDTrainer(LigerLossMixin, GKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""

    def replace_loss(self) -> None:
        _refuse_least_memory(self)
        apply_liger_loss(self)
        self.install_heads(self.teacher_model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.uses_liger_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        self.teacher_model.eval()
        with torch.no_grad():
            teacher: HeadTensors = self.teacher_model(**tokens, logits_to=lambda outputs, head: head)
        labels = shifted(inputs["labels"])
        counted = count_labels(labels, IGNORED)

        def divergence(outputs: Any, student: HeadTensors) -> Any:
            student = student.last(labels.shape[1])
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
                student_low_rank=student.low_rank,
                teacher_low_rank=teacher.low_rank,
                student_logit_scale=student.logit_scale,
                student_softcap=student.softcap,
                teacher_logit_scale=teacher.logit_scale,
                teacher_softcap=teacher.softcap,
                max_valid=upper_bound(counted),
                tile_bytes=self.memory_options()["tile_bytes"],
                compute_dtype=student.compute_dtype,
            )

        if not return_outputs:
            return model(**tokens, logits_to=divergence)
        with self.one_forward(fused_too=False):
            return model(**tokens, logits_to=divergence), model(**tokens)


@dataclass
class LigerDistillationConfig(LigerTRLArguments, DistillationConfig):
    """``trl.DistillationConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerDistillationTrainer(LigerLossMixin, DistillationTrainer):
    """``trl.DistillationTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`.

    TRL's code makes both models' hidden states and hands them to one function with both heads; that is replaced for
    the time of the call.
    """

    def replace_loss(self) -> None:
        """Nothing is installed: the loss is chosen in each forward."""
        _refuse_least_memory(self)
        check_head(_causal_lm(self.model))

    def _compute_loss(self, unwrapped_student: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.uses_liger_loss:
            return super()._compute_loss(unwrapped_student, *args, **kwargs)
        self._adapted_head = None
        outer = unwrapped_student.get_output_embeddings()
        if not is_plain(outer):
            # TRL's code reads a weight and a bias, of which an adapter on the head is no part.
            self._adapted_head = serving_module(outer)
            weight = next(outer.parameters())
            unwrapped_student.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)
        original = distillation_trainer._chunked_divergence_loss
        distillation_trainer._chunked_divergence_loss = self._divergence
        try:
            return super()._compute_loss(unwrapped_student, *args, **kwargs)
        finally:
            distillation_trainer._chunked_divergence_loss = original
            if self._adapted_head is not None:
                del unwrapped_student.get_output_embeddings

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
        student_low_rank = None
        if self._adapted_head is not None:
            layer, student_hidden_states, student_low_rank = product(self._adapted_head, student_hidden_states)
            student_lm_head_weight, student_lm_head_bias = layer.weight, layer.bias
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
            student_low_rank=student_low_rank,
            student_logit_scale=student_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_final_logit_softcapping,
            tile_bytes=self.memory_options()["tile_bytes"],
            outputs=("student_entropy",),
        )
        return output.loss, output.student_entropy.sum(), valid.sum()
