"""What to change when a step runs out of memory, said where the error is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .kernels._tiles import _TILE_BYTES

__all__ = ["MemoryAdvice", "settings_that_help"]

MIB = 1 << 20


def settings_that_help(trainer: Any, training: bool = True) -> list[str]:
    """Settings of ``trainer`` that take less memory in a step of training, or of evaluation, most effective first.

    Those that are in force already are left out.
    """
    args = trainer.args
    asked = getattr(args, "liger_options", None)
    options: dict[str, Any] = (asked() if callable(asked) else None) or {}
    found = []
    # transformers is about to rename the argument.
    checkpointed = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    sharded = getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False)
    if training and not checkpointed:
        found.append("gradient_checkpointing=True: activations are recomputed in the backward pass")
    if training and not checkpointed and options.get("recompute") != "cheap":
        found.append("liger_config={'recompute': 'cheap'}: outputs of norms and gated activations are, at little cost")
    if training and checkpointed and options.get("mlp_chunk_tokens") is None and options.get("mlp") is not False:
        found.append("liger_config={'mlp_chunk_tokens': 8192}: an MLP works on so many tokens at a time")
    if options.get("fused_linear_cross_entropy") is False:
        found.append("liger_config without fused_linear_cross_entropy=False: no logits are kept then")
    which = "train" if training else "eval"
    rows = getattr(args, f"per_device_{which}_batch_size")
    if rows > 1:
        found.append(f"per_device_{which}_batch_size below {rows}" + (", accumulating gradients" if training else ""))
    if not training and trainer.compute_metrics is not None and trainer.preprocess_logits_for_metrics is None:
        found.append("preprocess_logits_for_metrics: the logits of the whole evaluation are collected without it")
    tile = options.get("tile_bytes") or _TILE_BYTES
    found.append(
        f"liger_config={{'tile_bytes': {tile // 4}}}: the loss works on {tile // 4 // MIB} MiB of logits at a time in "
        f"place of {tile // MIB} MiB"
    )
    if training and getattr(args, "logits_cache_bytes", None) != 0 and hasattr(args, "logits_cache_bytes"):
        found.append("logits_cache_bytes=0: no logits are kept for the backward pass of the loss")
    if args.world_size > 1 and not sharded:
        found.append("FSDP or ZeRO (configs/accelerate/): weights, gradients and optimizer are spread over the devices")
    return found


@contextmanager
def _advice(trainer: Any, training: bool) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = "".join(f"\n  - {each}" for each in settings_that_help(trainer, training))
        error.add_note(f"A step of {'training' if training else 'evaluation'} would take less memory with{lines}")
        raise


class MemoryAdvice:
    """A mixin for trainers: a ``torch.OutOfMemoryError`` out of a step names the settings that would help."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with _advice(self, training=True):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with _advice(self, training=False):
            return super().prediction_step(*args, **kwargs)  # type: ignore[misc]
