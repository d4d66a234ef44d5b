"""Distillation by a generalised Jensen-Shannon divergence (Agarwal et al., 2024, https://arxiv.org/abs/2306.13649)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import linear_cross_entropy, linear_jsd

__all__ = ["LigerFusedLinearJSDLoss", "jsd_loss"]


def jsd_loss(
    student_log_probs: Tensor,  # (*, V)
    teacher_log_probs: Tensor,  # (*, V)
    *,
    beta: float = 0.5,
) -> Tensor:
    """(\\*) divergences between two distributions over V classes, given as log-probabilities.

    ``beta KL(t || m) + (1 - beta) KL(s || m)`` with ``m = (1 - beta) s + beta t``; ``beta=0`` is the forward divergence
    ``KL(t || s)``, ``beta=1`` the reverse one. For logits or heads of a real vocabulary use
    :func:`liger_trainer.kernels.jsd` and :func:`liger_trainer.kernels.linear_jsd`, which compute the same.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return divergence(teacher_log_probs, student_log_probs)
    if beta == 1:
        return divergence(student_log_probs, teacher_log_probs)
    mixture = torch.logaddexp(student_log_probs + math.log(1 - beta), teacher_log_probs + math.log(beta))
    return beta * divergence(teacher_log_probs, mixture) + (1 - beta) * divergence(student_log_probs, mixture)


class LigerFusedLinearJSDLoss(nn.Module):
    """:func:`jsd_loss` of two language-model heads and the labels' cross entropy, without the logits.

    The mixture is the function's, which is TRL's. Versions of Liger-Kernel's module of this name have weighed it the
    other way round, ``beta s + (1 - beta) t``; at their and our default of 0.5 it is the same.

    Args:
        weight_hard_loss: the weight of the cross entropy with the labels; at 0 it is not computed.
        weight_soft_loss: the weight of the divergence.
        beta: as the function's.
        ignore_index: tokens with this label take no part.
        temperature: both models' logits are divided by it for the divergence, not for the cross entropy.
        compiled, chunk_size: accepted so that Liger-Kernel's calls keep working, and without effect.
        options: as :func:`liger_trainer.kernels.linear_jsd`, such as ``tile_bytes``.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.options = options

    def forward(
        self,
        student_input: Tensor,  # (*, Hs)
        student_weight: Tensor,  # (V, Hs)
        teacher_input: Tensor,  # (*, Ht)
        teacher_weight: Tensor,  # (V, Ht)
        true_labels: Tensor,  # (*)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        *,
        student_low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (V, r)
        teacher_low_rank: tuple[Tensor, Tensor] | None = None,  # (*, r) and (V, r)
    ) -> Tensor:
        """The weighted sum of both losses, each a mean over the labels that are not ignored.

        A pair ``a`` (\\*, r) and ``b`` (V, r) adds ``a @ b.T`` to a model's logits, as in
        :func:`liger_trainer.kernels.linear_jsd`: a LoRA adapter's, ``a`` being the scaled output of its first layer.
        The student's gets a gradient.
        """
        divergence: Any = linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            beta=self.beta,
            temperature=self.temperature,
            labels=true_labels,
            ignore_index=self.ignore_index,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_low_rank=student_low_rank,
            teacher_low_rank=teacher_low_rank,
            **self.options,
        )
        loss: Tensor = self.weight_soft_loss * divergence
        if not self.weight_hard_loss:
            return loss
        hard: Any = linear_cross_entropy(
            student_input,
            student_weight,
            true_labels,
            bias=student_bias,
            low_rank=student_low_rank,
            ignore_index=self.ignore_index,
            logit_scale=self.options.get("student_logit_scale", 1.0),
            softcap=self.options.get("student_softcap"),
            tile_bytes=self.options.get("tile_bytes"),
            max_valid=self.options.get("max_valid"),
        )
        return loss + self.weight_hard_loss * hard
