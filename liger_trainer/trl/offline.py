"""SFT, DPO and KTO, which have answers given."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from .arguments import LigerTRLArguments
from .mixin import LigerLossMixin

__all__ = [
    "LigerDPOConfig",
    "LigerDPOTrainer",
    "LigerKTOConfig",
    "LigerKTOTrainer",
    "LigerSFTConfig",
    "LigerSFTTrainer",
]


@dataclass
class LigerSFTConfig(LigerTRLArguments, SFTConfig):
    """``trl.SFTConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerSFTTrainer(LigerLossMixin, SFTTrainer):
    """``trl.SFTTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""


@dataclass
class LigerDPOConfig(LigerTRLArguments, DPOConfig):
    """``trl.DPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerDPOTrainer(LigerLossMixin, DPOTrainer):
    """``trl.DPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""


@dataclass
class LigerKTOConfig(LigerTRLArguments, KTOConfig):
    """``trl.KTOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerKTOTrainer(LigerLossMixin, KTOTrainer):
    """``trl.KTOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""
