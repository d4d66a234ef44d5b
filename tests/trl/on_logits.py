"""TRL's trainers on logits that are built, for heads of which TRL's fused head would leave a part out."""

from __future__ import annotations

import functools
import types
from types import SimpleNamespace
from typing import Any

import torch
from trl import DistillationTrainer
from trl.trainer.utils import FusedCausalLMOutput

from liger_trainer.trl.fused_forward import trl_options
from liger_trainer.trl.mixin import _adapters_allowed_on_heads

__all__ = ["on_logits"]


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _from_logits(causal_lm: Any) -> None:
    """Have a model with TRL's fused head make that head's outputs from its logits, with plain autograd."""
    found = trl_options(causal_lm)
    if found is None:
        return
    original, options = found

    @functools.wraps(type(causal_lm).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        outputs = original(*args, **kwargs)
        if not fused_lm_head:
            return outputs
        logits, labels = outputs.logits[:, :-1] / options.temperature, labels[:, 1:]
        mask = labels != -100
        log_p = logits.log_softmax(-1)
        log_probs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=-(log_p.exp() * log_p).sum(-1) * mask,
            log_sum_sq_probs=(2 * log_p).logsumexp(-1) * mask,
            mean_logits=logits.mean(-1) * mask,
            is_top1=(logits.argmax(-1) == labels) & mask,
            label_mask=mask,
        )

    causal_lm.forward = types.MethodType(forward, causal_lm)


def _whole_weight(head: Any) -> torch.Tensor:
    """(V, H), differentiable: what an adapted head's outputs for the identity are."""
    return head(torch.eye(head.in_features if hasattr(head, "in_features") else head.original_module.in_features)).t()


def _without_virtual_tokens(model: Any) -> None:
    inner = model.forward

    def forward(input_ids, *args, **kwargs):
        outputs = inner(input_ids, *args, **kwargs)
        outputs.logits = outputs.logits[:, -input_ids.shape[1] :]
        return outputs

    model.forward = forward


def on_logits(trainer: type) -> type:
    """A subclass of a trainer of TRL's that takes adapters on the head, and has them in its loss."""

    class OnLogits(trainer):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _adapters_allowed_on_heads(type(self)):
                super().__init__(*args, **kwargs)
            for name in ("model", "ref_model"):
                if getattr(self, name, None) is not None:
                    _from_logits(_causal_lm(getattr(self, name)))
            if getattr(self.model, "active_peft_config", None) and self.model.active_peft_config.is_prompt_learning:
                _without_virtual_tokens(self.model)

    if trainer is DistillationTrainer:

        def _compute_loss(self: Any, student: Any, *args: Any, **kwargs: Any) -> Any:
            weight = _whole_weight(student.get_output_embeddings())
            student.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)
            try:
                return super(OnLogits, self)._compute_loss(student, *args, **kwargs)
            finally:
                del student.get_output_embeddings

        OnLogits._compute_loss = _compute_loss  # type: ignore[attr-defined]
    OnLogits.__name__ = trainer.__name__
    return OnLogits
