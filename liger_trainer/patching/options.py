"""The options of :func:`liger_trainer.apply_liger_kernel`, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

__all__ = ["RECOMPUTE", "Options"]

RECOMPUTE = ("norms", "cheap")
_RECOMPUTE = f"{', '.join(map(repr, RECOMPUTE))} or None"


@dataclass(frozen=True)
class Options:
    """What may be replaced.

    Args:
        rope: the rotary position embedding inside attention modules.
        rms_norm: RMS norms.
        layer_norm: layer norms.
        mlp: gated MLPs (SwiGLU, GEGLU).
        gelu: GELUs that are computed in several operations, by PyTorch's one.
        experts: the gates of a mixture's experts.
        lora: the addition of an adapter's product to the output of its frozen layer, for peft's LoRA layers.
        fused_add_rms_norm: the residual addition before an RMS norm, in one kernel with it; needs ``rms_norm``.
        cross_entropy: the loss on materialised logits. Excludes ``fused_linear_cross_entropy``.
        fused_linear_cross_entropy: LM head and loss as one op, which keeps no logits.
        recompute: ``"norms"`` rebuilds the outputs of norms in the backward pass instead of keeping them for the
            projections behind, ``"cheap"`` those of gated activations and written-out GELUs as well; the same gradients
            from less memory. None keeps them.
        mlp_chunk_tokens: the largest number of tokens that a gated MLP works on at a time; its inner activations are
            made again in the backward pass, chunk by chunk. For very long contexts. None works on all at once.
        tile_bytes: size in bytes of the largest logits tile of the fused head; None lets the kernel choose.
        check: run every kernel beside the part that it replaces, output and gradients, before replacing it. Without,
            what a part computes is still found out by running it, and the kernel is trusted.
    """

    rope: bool = True
    rms_norm: bool = True
    layer_norm: bool = True
    mlp: bool = True
    gelu: bool = True
    experts: bool = True
    lora: bool = False
    fused_add_rms_norm: bool = True
    cross_entropy: bool = False
    fused_linear_cross_entropy: bool = True
    recompute: str | None = None
    mlp_chunk_tokens: int | None = None
    tile_bytes: int | None = None
    check: bool = True

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Build from keyword options.

        Raises:
            TypeError: an unknown option, a switch that is not a bool, a ``recompute`` that is not a string, or
                ``tile_bytes`` or ``mlp_chunk_tokens`` that is not an int.
            ValueError: ``tile_bytes`` or ``mlp_chunk_tokens`` below 1, the latter without ``mlp``, an unknown
                ``recompute``, or both cross-entropy switches on.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; the known options are {', '.join(known)}")
        parsed = cls(**options)
        for name in known:
            value = getattr(parsed, name)
            if name in ("tile_bytes", "mlp_chunk_tokens"):
                if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                    raise TypeError(f"{name} must be an int or None, got {value!r}")
                if value is not None and value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")
            elif name == "recompute":
                if value is not None and not isinstance(value, str):
                    raise TypeError(f"recompute must be {_RECOMPUTE}, got {value!r}")
            elif not isinstance(value, bool):
                raise TypeError(f"option {name} must be True or False, got {value!r}")
        if parsed.mlp_chunk_tokens is not None and not parsed.mlp:
            raise ValueError(f"mlp_chunk_tokens={parsed.mlp_chunk_tokens} needs mlp=True, got mlp=False")
        if parsed.recompute not in (None, *RECOMPUTE):
            raise ValueError(f"recompute must be {_RECOMPUTE}, got {parsed.recompute!r}")
        if parsed.cross_entropy and parsed.fused_linear_cross_entropy:
            raise ValueError(
                "cross_entropy=True and fused_linear_cross_entropy=True exclude each other: the fused head leaves no "
                "logits for a cross-entropy kernel. Set one of them to False."
            )
        return parsed
