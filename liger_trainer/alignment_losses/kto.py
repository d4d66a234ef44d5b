"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306), of unpaired answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._sequences import HeadLoss, check_names

__all__ = ["KTO_LOSS_TYPES", "LigerFusedLinearKTOLoss", "kto_kl", "kto_loss"]

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """() the estimate of the divergence of policy from reference, from (B,) log-probabilities of mismatched answers.

    At least 0, and without gradient. Over several processes, the mean of their estimates is to be clamped instead.
    """
    return (logps - ref_logps).mean().detach().clamp(min=0)


def kto_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor | None,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl: Tensor | None = None,  # () or (B,)
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The loss of each of B answers, from its log-probabilities under policy and reference.

    With an answer's log-ratio ``r`` of policy to reference, ``kto`` (eq. 7) is ``1 - sigmoid(beta * (r - kl))`` of a
    desirable answer and ``1 - sigmoid(beta * (kl - r))`` of another. ``apo_zero_unpaired`` (D'Oosterlinck et al., 2024,
    https://arxiv.org/abs/2408.06266, eq. 7, unpaired) has no ``kl``.

    Args:
        logps, ref_logps: (B,) sums over the answers' tokens; None stands for zeros.
        desirable: (B,) whether the answer is one to be learnt.
        kl: :func:`kto_kl`; None stands for 0.
        loss_type: one of ``KTO_LOSS_TYPES``.
        beta: above 0; how strongly the policy is held to the reference.
        desirable_weight, undesirable_weight: factors of the two kinds' losses.

    Returns:
        (B,) losses, to be averaged.

    Raises:
        ValueError: for an unknown loss type.
    """
    check_names("loss_type", (loss_type,), KTO_LOSS_TYPES)
    log_ratios = logps if ref_logps is None else logps - ref_logps
    if kl is not None and loss_type == "kto":
        log_ratios = log_ratios - kl
    good = desirable.to(log_ratios.dtype)
    losses = 1 - torch.sigmoid(beta * (2 * good - 1) * log_ratios)
    return losses * (desirable_weight * good + undesirable_weight * (1 - good))


class LigerFusedLinearKTOLoss(HeadLoss):
    """:func:`kto_loss` of a language-model head, whose logits are never built.

    Args:
        ignore_index, use_ref_model, average_log_prob, compiled, chunk_size: as :class:`HeadLoss`.
        beta, loss_type, desirable_weight, undesirable_weight: as the function's.
        options: ``logit_scale``, ``softcap``, ``temperature``, ``tile_bytes``, ``cache_bytes``, ``least_memory``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        loss_type: str = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Any,
    ) -> None:
        check_names("loss_type", (loss_type,), KTO_LOSS_TYPES)
        super().__init__(
            ignore_index=ignore_index,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            compiled=compiled,
            chunk_size=chunk_size,
            **options,
        )
        self.beta = beta
        self.options = {
            "loss_type": loss_type,
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (B,)
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | None = None,  # () or (B,)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (B, T, r) and (V, r)
        ref_logps: Tensor | None = None,  # (B,)
        max_valid: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what to log of it.

        The weight comes second, as in Liger-Kernel, whose DPO, ORPO, CPO and SimPO modules take it first: name the
        arguments.

        Args:
            _input, lin_weight, target, bias: hidden states, head and labels already shifted, of B answers.
            preference_labels: (B,) bool, whether the answer is one to be learnt.
            ref_input, ref_weight, ref_bias: the reference's, where ``use_ref_model``.
            kl: :func:`kto_kl`.
            ref_logps: the reference's log-probabilities of the answers in their place, computed before.
            low_rank: a pair ``a`` (B, T, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the policy's
                logits, as in :func:`liger_trainer.kernels.linear_log_probs`: a LoRA adapter's, ``a`` being the scaled
                output of its first layer. Both get a gradient. The reference takes none.
            max_valid: an upper bound, known to the host, of the number of labels that are not ignored, as
                :func:`liger_trainer.kernels.linear_log_probs`. Without one the host waits once for the device's count.

        Returns:
            The loss and sums without gradient, over desirable and over other answers in turn: of their
            log-probabilities, of their logits over labelled tokens and vocabulary, and of their rewards.
        """
        if preference_labels is None:
            raise ValueError("preference_labels must be a bool an answer, got None")
        max_valid = self.bound(target, max_valid)
        policy = self.score(_input, lin_weight, target, bias, ("mean_logits",), low_rank=low_rank, max_valid=max_valid)
        if ref_logps is None:
            reference = self.score_reference(ref_input, ref_weight, target, ref_bias, max_valid=max_valid)
            ref_logps = torch.zeros_like(policy.log_probs) if reference is None else reference.log_probs
        loss = kto_loss(policy.log_probs, ref_logps, preference_labels, kl, **self.options).mean()  # type: ignore[arg-type]
        assert policy.tokens.mean_logits is not None
        logps = policy.log_probs.detach()
        logged = logps, policy.tokens.mean_logits.detach().sum(-1) * len(lin_weight), self.beta * (logps - ref_logps)
        kinds = preference_labels.bool(), ~preference_labels.bool()
        return loss, tuple((each * kind).sum() for each in logged for kind in kinds)
