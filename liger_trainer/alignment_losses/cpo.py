"""Contrastive preference optimisation (Xu et al., 2024, https://arxiv.org/abs/2401.08417) and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._sequences import HeadLoss, check_names, logistic_loss

__all__ = ["CPO_LOSS_TYPES", "LigerFusedLinearCPOLoss", "alpha_rewards", "cpo_loss"]

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")


def alpha_rewards(logps: Tensor, alpha: float) -> Tensor:
    """``(1 - p**-alpha) / alpha`` of log-probabilities, at ``alpha=0`` these themselves.

    AlphaPO, Gupta et al., 2025, https://arxiv.org/abs/2501.03884.
    """
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def cpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """The loss of each of B pairs of answers, from their log-probabilities under the policy alone.

    The formulas are those of TRL's ``CPOTrainer``. ``sigmoid`` is the paper's, ``-log sigmoid(beta * (chosen -
    rejected))``; ``hinge`` (Zhao et al., 2023, https://arxiv.org/abs/2305.10425) and ``ipo`` (Azar et al., 2023,
    https://arxiv.org/abs/2310.12036) are as DPO's; ``simpo`` (Meng et al., 2024, https://arxiv.org/abs/2405.14734)
    asks for a margin ``simpo_gamma``; ``alphapo`` is ``simpo`` over :func:`alpha_rewards`.

    Args:
        chosen_logps, rejected_logps: (B,) sums over the answers' tokens, or for ``ipo``, ``simpo`` and ``alphapo``
            their means.
        loss_type: one of ``CPO_LOSS_TYPES``.
        beta: above 0.
        label_smoothing: the share of labels taken for wrong; not used by ``hinge`` and ``ipo``.
        simpo_gamma: the margin of ``simpo`` and ``alphapo``.
        alpha: of :func:`alpha_rewards`, which any of the types may be given.

    Returns:
        (B,) losses, to be averaged.

    Raises:
        ValueError: for an unknown loss type.
    """
    check_names("loss_type", (loss_type,), CPO_LOSS_TYPES)
    difference = alpha_rewards(chosen_logps, alpha) - alpha_rewards(rejected_logps, alpha)
    if loss_type == "hinge":
        return torch.relu(1 - beta * difference)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)).square()
    margin = simpo_gamma if loss_type in ("simpo", "alphapo") else 0.0
    return logistic_loss(beta * difference - margin, label_smoothing)


class LigerFusedLinearCPOLoss(HeadLoss):
    """:func:`cpo_loss` of a language-model head, whose logits are never built.

    Args:
        ignore_index, compiled, chunk_size: as :class:`HeadLoss`.
        beta, label_smoothing, loss_type, simpo_gamma: as the function's.
        alpha: the weight of the chosen answers' negative log-likelihood (Liger-Kernel's name; TRL's is ``cpo_alpha``).
        compute_nll_loss: whether to add it.
        average_log_prob: whether to take means over the tokens; None does for ``ipo``, ``simpo`` and ``alphapo``.
        reward_alpha: the function's ``alpha``, TRL's ``alpha``.
        options: ``logit_scale``, ``softcap``, ``temperature``, ``tile_bytes``, ``cache_bytes``, ``least_memory``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool | None = None,
        chunk_size: int = 1,
        *,
        loss_type: str = "sigmoid",
        simpo_gamma: float = 0.5,
        reward_alpha: float = 0.0,
        **options: Any,
    ) -> None:
        check_names("loss_type", (loss_type,), CPO_LOSS_TYPES)
        average = loss_type in ("ipo", "simpo", "alphapo") if average_log_prob is None else average_log_prob
        super().__init__(
            ignore_index=ignore_index, average_log_prob=average, compiled=compiled, chunk_size=chunk_size, **options
        )
        self.alpha = alpha
        self.beta = beta
        self.reward_alpha = reward_alpha
        self.compute_nll_loss = compute_nll_loss
        self.options = {
            "loss_type": loss_type,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "simpo_gamma": simpo_gamma,
            "alpha": reward_alpha,
        }

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2B, T, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (2B, T, r) and (V, r)
        max_valid: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what to log of it.

        Args:
            lin_weight, _input, target, bias: head, hidden states and labels already shifted; B chosen answers, then
                the B rejected ones in their order.
            low_rank: a pair ``a`` (2B, T, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the policy's
                logits, as in :func:`liger_trainer.kernels.linear_log_probs`: a LoRA adapter's, ``a`` being the scaled
                output of its first layer. Both get a gradient.
            max_valid: an upper bound, known to the host, of the number of labels that are not ignored, as
                :func:`liger_trainer.kernels.linear_log_probs`. Without one the host waits once for the device's count.

        Returns:
            The loss and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards, rejected_rewards), of which the means are over the labelled tokens and without gradient.
        """
        max_valid = self.bound(target, max_valid)
        policy = self.score(_input, lin_weight, target, bias, ("mean_logits",), low_rank=low_rank, max_valid=max_valid)
        chosen, rejected = policy.log_probs.chunk(2)
        of_chosen = policy.mask.chunk(2)[0]
        nll = -policy.tokens.log_probs.chunk(2)[0].sum() / of_chosen.sum().clamp(min=1)
        loss = cpo_loss(chosen, rejected, **self.options).mean()  # type: ignore[arg-type]
        if self.compute_nll_loss:
            loss = loss + self.alpha * nll
        rewards = [self.beta * alpha_rewards(each.detach(), self.reward_alpha) for each in (chosen, rejected)]
        return loss, (chosen, rejected, *policy.mean_logits(), nll, *rewards)
