"""Simple preference optimisation (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cpo import LigerFusedLinearCPOLoss, cpo_loss

__all__ = ["LigerFusedLinearSimPOLoss", "simpo_loss"]


def simpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """(B,) ``-log sigmoid(beta * (chosen - rejected) - gamma)``, from means over the answers' tokens.

    Args:
        chosen_logps, rejected_logps: (B,) means over the answers' tokens.
        beta: the scale of the reward.
        gamma: the margin to be kept.
        label_smoothing: the share of labels taken for wrong.
        alpha: of :func:`~liger_trainer.alignment_losses.cpo.alpha_rewards`, which makes it AlphaPO.
    """
    return cpo_loss(
        chosen_logps,
        rejected_logps,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        alpha=alpha,
    )


class LigerFusedLinearSimPOLoss(LigerFusedLinearCPOLoss):
    """:func:`simpo_loss` of a language-model head, whose logits are never built.

    Args:
        ignore_index, alpha, compiled, chunk_size: as :class:`LigerFusedLinearCPOLoss`.
        beta, gamma, label_smoothing: as the function's.
        compute_nll_loss: whether to add ``alpha`` times the chosen answers' negative log-likelihood. On by default as
            in Liger-Kernel; the paper's loss has none.
        options: ``reward_alpha``, ``logit_scale``, ``softcap``, ``temperature``, ``tile_bytes``, ``cache_bytes``,
            ``least_memory``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index,
            beta,
            alpha,
            label_smoothing,
            compute_nll_loss,
            compiled,
            chunk_size=chunk_size,
            loss_type="simpo",
            simpo_gamma=gamma,
            **options,
        )
