"""Odds ratio preference optimisation (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._sequences import HeadLoss, logistic_loss, sequence_log_probs

__all__ = ["LigerFusedLinearORPOLoss", "log_odds_ratio", "orpo_loss"]


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of negative x, of the two forms the one that loses no digits there."""
    return torch.where(x < -0.6931471805599453, torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The logarithm of the odds of the chosen over those of the rejected answers, of any shape (eq. 4, 7)."""
    return (chosen_logps - rejected_logps) - (_log1mexp(chosen_logps) - _log1mexp(rejected_logps))


def orpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    beta: float = 0.1,
) -> Tensor:
    """(B,) what the odds ratio adds to the chosen answers' negative log-likelihood.

    Args:
        chosen_logps, rejected_logps: (B,) means over the answers' tokens, below 0.
        beta: the weight of the odds ratio, lambda in the paper.
    """
    return beta * logistic_loss(log_odds_ratio(chosen_logps, rejected_logps))


class LigerFusedLinearORPOLoss(HeadLoss):
    """:func:`orpo_loss` and the chosen answers' likelihood of a language-model head, whose logits are never built.

    Args:
        ignore_index, compiled, chunk_size: as :class:`HeadLoss`.
        beta: as the function's.
        compute_nll_loss: whether to add the negative log-likelihood, which the paper's loss does.
        options: ``logit_scale``, ``softcap``, ``temperature``, ``tile_bytes``, ``cache_bytes``, ``least_memory``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, average_log_prob=True, compiled=compiled, chunk_size=chunk_size, **options
        )
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2B, T, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        nll_target: Tensor | None = None,  # (B, T)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (2B, T, r) and (V, r)
        max_valid: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what to log of it.

        Args:
            lin_weight, _input, target, bias: head, hidden states and labels already shifted; B chosen answers, then
                the B rejected ones in their order.
            nll_target: (B, T) labels of the negative log-likelihood, which the paper takes over the prompt too; those
                of ``target`` must be among them. None takes the chosen answers'.
            low_rank: a pair ``a`` (2B, T, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the policy's
                logits, as in :func:`liger_trainer.kernels.linear_log_probs`: a LoRA adapter's, ``a`` being the scaled
                output of its first layer. Both get a gradient.
            max_valid: an upper bound, known to the host, of the number of labels that are not ignored, as
                :func:`liger_trainer.kernels.linear_log_probs`. Without one the host waits once for the device's count.

        Returns:
            The loss and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
            log_odds_ratio, log_odds_chosen), of which the means are over the labelled tokens and without gradient.
        """
        labels = target
        if nll_target is not None:
            if nll_target.shape != target.chunk(2)[0].shape:
                raise ValueError(
                    f"nll_target must have the shape of the chosen half of target, "
                    f"{tuple(target.chunk(2)[0].shape)}; got {tuple(nll_target.shape)}"
                )
            labels = torch.cat([nll_target, target.chunk(2)[1]])
        max_valid = self.bound(labels, max_valid)
        policy = self.score(_input, lin_weight, labels, bias, ("mean_logits",), low_rank=low_rank, max_valid=max_valid)
        logps = sequence_log_probs(policy.tokens.log_probs, target != self.ignore_index, average=True)
        chosen, rejected = logps.chunk(2)
        of_chosen = policy.mask.chunk(2)[0]
        nll = -policy.tokens.log_probs.chunk(2)[0].sum() / of_chosen.sum().clamp(min=1)
        losses = orpo_loss(chosen, rejected, beta=self.beta)
        loss = losses.mean() + nll if self.compute_nll_loss else losses.mean()
        log_odds = log_odds_ratio(chosen, rejected).detach()
        ratio = -logistic_loss(log_odds).mean()
        return loss, (chosen, rejected, *policy.mean_logits(), nll, ratio, log_odds.mean())
