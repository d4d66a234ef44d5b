"""ORPO, CPO and SimPO, from ``trl.experimental``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from .arguments import LigerTRLArguments
from .fused_forward import IGNORED
from .pairs import ConcatenatedForward

__all__ = [
    "LigerCPOConfig",
    "LigerCPOTrainer",
    "LigerORPOConfig",
    "LigerORPOTrainer",
    "LigerSimPOConfig",
    "LigerSimPOTrainer",
]


@dataclass
class LigerORPOConfig(LigerTRLArguments, ORPOConfig):
    """``trl.experimental.orpo.ORPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerORPOTrainer(ConcatenatedForward, ORPOTrainer):  # type: ignore[misc]
    """``trl.experimental.orpo.ORPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""

    def averages_log_probs(self) -> bool:
        return True

    def likelihood_labels(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.where(batch["concatenated_attention_mask"] == 1, batch["concatenated_input_ids"], IGNORED)

    def counts_last_position(self) -> bool:
        return False


@dataclass
class LigerCPOConfig(LigerTRLArguments, CPOConfig):
    """``trl.experimental.cpo.CPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerCPOTrainer(ConcatenatedForward, CPOTrainer):  # type: ignore[misc]
    """``trl.experimental.cpo.CPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""

    def averages_log_probs(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    def likelihood_labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        return None if self.cpo_alpha == 0 else batch["concatenated_labels"]

    def counts_last_position(self) -> bool:
        return True


@dataclass
class LigerSimPOConfig(LigerCPOConfig):
    """:class:`LigerCPOConfig` whose defaults are SimPO's: ``loss_type="simpo"`` and ``cpo_alpha=0``."""

    loss_type: str = field(default="simpo", metadata={"help": "The type of loss; SimPO's by default."})
    cpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the likelihood, which SimPO does without."})


class LigerSimPOTrainer(LigerCPOTrainer):
    """:class:`LigerCPOTrainer` under the name of the loss that :class:`LigerSimPOConfig` chooses."""
