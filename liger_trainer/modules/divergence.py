"""Divergences between a student's and a teacher's distribution as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels import jsd, kl_div, linear_jsd

__all__ = ["LigerFusedLinearJSD", "LigerJSD", "LigerKLDIVLoss"]


class LigerKLDIVLoss(nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss` in one pass, :func:`liger_trainer.kernels.kl_div`.

    Args:
        eps: accepted so that Liger-Kernel's calls keep working, and without effect: as in PyTorch, a class of target
            probability 0 adds nothing, whatever its logarithm.
        reduction, log_target: as in :class:`torch.nn.KLDivLoss`, whose deprecated ``size_average`` and ``reduce`` are
            not taken.
    """

    def __init__(self, eps: float = 1e-10, *, reduction: str = "mean", log_target: bool = False) -> None:
        super().__init__(reduction=reduction, log_target=log_target)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """y_pred: (\\*, V) log-probabilities; y_true: (\\*, V) probabilities, or their logarithms."""
        return kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target)


class LigerJSD(nn.Module):
    """Generalised Jensen-Shannon divergence of given log-probabilities, :func:`liger_trainer.kernels.jsd`.

    Args:
        beta: in [0, 1]; 0 is ``KL(p || q)``, 1 is ``KL(q || p)``.
        ignore_index: rows with this label are left out.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """log_q: (N, V) the student's; log_p: (N, V) the teacher's; shift_labels: (N,). A mean over the labels."""
        return jsd(log_q, log_p, beta=self.beta, labels=shift_labels, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, ignore_index={self.ignore_index}"


class LigerFusedLinearJSD(nn.Module):
    """Two language-model heads and the divergence between them, :func:`liger_trainer.kernels.linear_jsd`.

    Args:
        jsd_beta: in [0, 1]; 0 is ``KL(teacher || student)``, 1 is ``KL(student || teacher)``.
        ignore_index: rows with this label are left out.
        temperature: both models' logits are divided by it.
    """

    def __init__(self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
        *,
        student_low_rank: tuple[Tensor, Tensor] | None = None,
        teacher_low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(N, Hs), (V, Hs), (N, Ht), (V, Ht), (N,); a mean over the labels.

        A pair ``a`` (N, r) and ``b`` (V, r) adds ``a @ b.T`` to a model's logits, a LoRA adapter's, ``a`` being the
        scaled output of its first layer. The student's gets a gradient.
        """
        loss: Any = linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            beta=self.jsd_beta,
            temperature=self.temperature,
            labels=shift_labels,
            ignore_index=self.ignore_index,
            student_low_rank=student_low_rank,
            teacher_low_rank=teacher_low_rank,
        )
        return loss

    def extra_repr(self) -> str:
        return f"jsd_beta={self.jsd_beta}, ignore_index={self.ignore_index}, temperature={self.temperature}"
