"""Configs of TRL's trainers with ``use_liger``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..arguments import LigerArguments

__all__ = ["LigerTRLArguments"]


@dataclass
class LigerTRLArguments(LigerArguments):
    """The fields that liger_trainer adds to the configs of TRL's trainers.

    Attributes:
        use_liger: as :class:`liger_trainer.LigerArguments`, but on unless it is set to False: who takes a config of
            this package asks for it. Off, the trainer is TRL's.
        liger_config: as there; the option ``tile_bytes`` bounds the tiles of logits of the loss as well.
        logits_cache_bytes: how many bytes of logits may wait from forward to backward instead of being recomputed, see
            ``cache_bytes`` of :func:`liger_trainer.kernels.linear_log_probs`. None chooses.
        least_memory: keep no logits where ``logits_cache_bytes`` is None, and tile the vocabulary in the backward too,
            so that no fp32 buffer of the head's size exists: slower. See there. The distillation trainers have no such
            mode.

    Raises:
        ValueError: ``logits_cache_bytes`` below 0.
    """

    use_liger: bool = field(
        default=True,
        metadata={"help": "Replace the model's layers and the loss by liger_trainer's kernels."},
    )
    logits_cache_bytes: int | None = field(
        default=None,
        metadata={"help": "Bytes of logits that may wait from forward to backward instead of being recomputed."},
    )

    least_memory: bool = field(
        default=False,
        metadata={"help": "Keep no logits and no fp32 buffer of the LM head's gradient, at the price of speed."},
    )

    def __post_init__(self) -> None:
        if self.logits_cache_bytes is not None and self.logits_cache_bytes < 0:
            raise ValueError(f"logits_cache_bytes must be at least 0, got {self.logits_cache_bytes}")
        super().__post_init__()
