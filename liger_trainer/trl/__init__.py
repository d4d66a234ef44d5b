"""TRL's trainers on liger_trainer's kernels: a script changes its import and a class name, nothing else.

.. code-block:: python

    from liger_trainer.trl import LigerDPOConfig, LigerDPOTrainer

    LigerDPOTrainer(model, args=LigerDPOConfig("out"), train_dataset=pairs).train()

TRL's own code of losses and metrics runs unchanged. What is replaced is where its numbers come from: the policy's and
the reference's log-probabilities, and a student's divergence from its teacher, are computed from hidden states and the
head's weight in tiles of logits.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import LigerTRLArguments
    from .distillation import LigerDistillationConfig, LigerDistillationTrainer, LigerGKDConfig, LigerGKDTrainer
    from .mixin import LigerLossMixin, apply_liger_loss
    from .offline import (
        LigerDPOConfig,
        LigerDPOTrainer,
        LigerKTOConfig,
        LigerKTOTrainer,
        LigerSFTConfig,
        LigerSFTTrainer,
    )
    from .online import LigerGRPOConfig, LigerGRPOTrainer, LigerRLOOConfig, LigerRLOOTrainer
    from .reference_free import (
        LigerCPOConfig,
        LigerCPOTrainer,
        LigerORPOConfig,
        LigerORPOTrainer,
        LigerSimPOConfig,
        LigerSimPOTrainer,
    )

__all__ = [
    "LigerCPOConfig",
    "LigerCPOTrainer",
    "LigerDPOConfig",
    "LigerDPOTrainer",
    "LigerDistillationConfig",
    "LigerDistillationTrainer",
    "LigerGKDConfig",
    "LigerGKDTrainer",
    "LigerGRPOConfig",
    "LigerGRPOTrainer",
    "LigerKTOConfig",
    "LigerKTOTrainer",
    "LigerLossMixin",
    "LigerORPOConfig",
    "LigerORPOTrainer",
    "LigerRLOOConfig",
    "LigerRLOOTrainer",
    "LigerSFTConfig",
    "LigerSFTTrainer",
    "LigerSimPOConfig",
    "LigerSimPOTrainer",
    "LigerTRLArguments",
    "apply_liger_loss",
]

# Imported on first use: each of TRL's trainers takes seconds to import, and some are experimental.
_HOME = {
    "LigerLossMixin": "mixin",
    "LigerTRLArguments": "arguments",
    "apply_liger_loss": "mixin",
    **{
        f"Liger{name}{kind}": home
        for home, names in {
            "distillation": ("Distillation", "GKD"),
            "offline": ("DPO", "KTO", "SFT"),
            "online": ("GRPO", "RLOO"),
            "reference_free": ("CPO", "ORPO", "SimPO"),
        }.items()
        for name in names
        for kind in ("Config", "Trainer")
    },
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
