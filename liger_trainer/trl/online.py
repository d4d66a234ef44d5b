"""GRPO and RLOO, which sample their own answers."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from .arguments import LigerTRLArguments
from .mixin import LigerLossMixin

__all__ = ["LigerGRPOConfig", "LigerGRPOTrainer", "LigerRLOOConfig", "LigerRLOOTrainer"]


@dataclass
class LigerGRPOConfig(LigerTRLArguments, GRPOConfig):
    """``trl.GRPOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerGRPOTrainer(LigerLossMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""


@dataclass
class LigerRLOOConfig(LigerTRLArguments, RLOOConfig):
    """``trl.RLOOConfig`` with :class:`LigerTRLArguments`' fields."""


class LigerRLOOTrainer(LigerLossMixin, RLOOTrainer):
    """``trl.RLOOTrainer`` on liger_trainer's kernels; see :class:`LigerLossMixin`."""
