"""CPO and ORPO: trainers that read their logits in three places, where one pass over them gives all three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..alignment_losses._sequences import sequence_log_probs
from ..kernels import linear_log_probs
from ..patching.counted_labels import count_labels
from .deferred_head import HeadTensors
from .fused_forward import IGNORED, upper_bound
from .mixin import LigerLossMixin

__all__ = ["ConcatenatedForward", "shifted"]


class ConcatenatedForward(LigerLossMixin):
    """Replaces ``concatenated_forward``, which makes log-probabilities, a likelihood and means from logits."""

    def replace_loss(self) -> None:
        trainer: Any = self
        if trainer.is_encoder_decoder:
            raise ValueError(
                f"{type(self).__name__} does not do without the logits of an encoder-decoder model. Set "
                "use_liger=False, or use TRL's own trainer."
            )
        self.install_heads(trainer.model)

    def averages_log_probs(self) -> bool:
        """Whether the loss is over means of the tokens' log-probabilities."""
        raise NotImplementedError

    def likelihood_labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Labels (2B, T) of the chosen answers' likelihood, of which the answers' are a part; None without one."""
        raise NotImplementedError

    def counts_last_position(self) -> bool:
        """Whether the means of the logits are over the last position too, which predicts nothing."""
        raise NotImplementedError

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """(chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll_loss[, aux_loss]) as TRL's.

        In the place of the logits, whose means are all that is made of them, stand these means.
        """
        trainer: Any = self
        if not self.uses_liger_loss:
            return super().concatenated_forward(model, batch)  # type: ignore[misc]
        n_chosen = batch["chosen_labels"].shape[0]
        whole = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=getattr(trainer, "pad_token_id", getattr(trainer, "padding_value", None)),
            device=trainer.accelerator.device,
        )
        answers = shifted(whole["concatenated_labels"])
        likelihood = self.likelihood_labels(whole)
        labels = answers
        if likelihood is not None:
            labels = torch.cat([shifted(likelihood)[:n_chosen], answers[n_chosen:]])
        counted = count_labels(labels, IGNORED)  # on its way to the host while the model runs
        n_positions = None if self.counts_last_position() else -1

        def score(outputs: Any, head: HeadTensors) -> tuple[Tensor, ...]:
            head = head.last(labels.shape[1])
            log_probs: Any = linear_log_probs(
                head.hidden,
                head.weight,
                labels,
                bias=head.bias,
                low_rank=head.low_rank,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                compute_dtype=head.compute_dtype,
                max_valid=upper_bound(counted),
                **self.memory_options(),
            )
            means = head.mean_of_logits(**self.memory_options())[:, :n_positions]
            aux_loss = getattr(outputs, "aux_loss", None)
            return (log_probs, means) if aux_loss is None else (log_probs, means, aux_loss)

        kwargs = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        log_probs, means, *aux_loss = model(
            whole["concatenated_input_ids"],
            attention_mask=whole["concatenated_attention_mask"],
            use_cache=False,
            logits_to=score,
            **kwargs,
        )
        logps = sequence_log_probs(log_probs, answers != IGNORED, average=self.averages_log_probs())
        nll = log_probs.new_zeros(())
        if likelihood is not None:
            nll = -log_probs[:n_chosen].sum() / (labels[:n_chosen] != IGNORED).sum()
        return (
            logps[:n_chosen],
            logps[n_chosen:],
            means[:n_chosen].mean(),
            means[n_chosen:].mean(),
            nll,
            *(aux_loss if trainer.aux_loss_enabled else ()),
        )


def shifted(labels: Tensor) -> Tensor:
    """(B, T) the labels of the positions before; the last, which predicts nothing, is ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
