"""What the losses share: sums over sequences, the logistic loss of a margin, and the head behind their modules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import LogProbs, linear_log_probs

__all__ = ["HeadLoss", "Sequences", "check_names", "logistic_loss", "sequence_log_probs"]


def check_names(argument: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} must be among {known}, got {name!r}")


def logistic_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(margin)``, mixed by ``label_smoothing`` with that of the opposite label."""
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = loss * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return loss


def sequence_log_probs(
    log_probs: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    average: bool = False,
) -> Tensor:
    """(B,) log-probabilities of whole sequences: sums over the tokens of ``mask``, or with ``average`` their means."""
    sums = (log_probs * mask).sum(-1)
    return sums / mask.sum(-1).clamp(min=1) if average else sums


class Sequences(NamedTuple):
    """Sequences of tokens as a head scored them."""

    tokens: LogProbs  # of (B, T) tensors
    mask: Tensor  # (B, T) bool: where there is a label
    log_probs: Tensor  # (B,)
    lengths: Tensor  # (B,) tokens with a label, at least 1

    def mean_logits(self) -> tuple[Tensor, Tensor]:
        """Means of the logits over the labelled tokens of the first and of the second half of the sequences."""
        assert self.tokens.mean_logits is not None
        sums = self.tokens.mean_logits.detach().sum(-1)
        halves = [each.sum() for half in (sums, self.mask.sum(-1)) for each in half.chunk(2)]
        return halves[0] / halves[2].clamp(min=1), halves[1] / halves[3].clamp(min=1)


class HeadLoss(nn.Module):
    """Base of the modules that join a loss to a language-model head.

    Args:
        ignore_index: tokens with this label take no part.
        use_ref_model: whether a reference is scored; without one its log-probabilities are 0.
        average_log_prob: take means over the tokens of a sequence instead of sums.
        compiled, chunk_size: accepted so that Liger-Kernel's calls keep working, and without effect.
        logit_scale, softcap, temperature, tile_bytes, cache_bytes, least_memory: as
            :func:`liger_trainer.kernels.linear_log_probs`.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        compiled: bool = True,
        chunk_size: int = 1,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        tile_bytes: int | None = None,
        cache_bytes: int | None = None,
        least_memory: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.head_options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "tile_bytes": tile_bytes,
            "cache_bytes": cache_bytes,
            "least_memory": least_memory,
        }

    def bound(self, labels: Tensor, max_valid: int | None) -> int | None:
        """``max_valid`` of :meth:`score`: the caller's, or the number of the labels, for which the host waits once."""
        if max_valid is not None or torch.compiler.is_compiling():
            return max_valid
        return int((labels != self.ignore_index).sum())

    def score(
        self,
        hidden: Tensor,  # (B, T, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (B, T)
        bias: Tensor | None,  # (V,)
        outputs: tuple[str, ...] = (),
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (B, T, r) and (V, r)
        max_valid: int | None,
    ) -> Sequences:
        if weight.dim() != 2 or hidden.dim() != 3 or labels.dim() != 2:
            raise ValueError(
                "hidden states, weight and labels must have shapes (B, T, H), (V, H) and (B, T); "
                f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
            )
        tokens = linear_log_probs(
            hidden,
            weight,
            labels,
            bias=bias,
            low_rank=low_rank,
            outputs=outputs,
            max_valid=max_valid,
            **self.head_options,
        )
        if isinstance(tokens, Tensor):
            tokens = LogProbs(tokens)
        mask = labels != self.ignore_index
        log_probs = sequence_log_probs(tokens.log_probs, mask, average=self.average_log_prob)
        return Sequences(tokens, mask, log_probs, mask.sum(-1).clamp(min=1))

    def score_reference(
        self,
        hidden: Tensor | None,  # (B, T, H)
        weight: Tensor | None,  # (V, H)
        labels: Tensor,  # (B, T)
        bias: Tensor | None,  # (V,)
        *,
        max_valid: int | None,
    ) -> Sequences | None:
        """The reference's sequences without any gradient, or None where there is no reference."""
        if not self.use_ref_model:
            return None
        if hidden is None or weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight, got None")
        with torch.no_grad():
            return self.score(hidden, weight, labels, bias, max_valid=max_valid)
