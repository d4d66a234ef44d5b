"""Who trains: transformers, torch.compile, Liger-Kernel, TRL, or liger_trainer with any of its options."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["PREFERENCE_PROVIDERS", "PROVIDERS", "Provider"]

PROVIDERS = ("hf", "hf-compile", "liger-kernel", "trl", "ours", "ours-compile")
PREFERENCE_PROVIDERS = ("trl", "liger-kernel", "ours")


@dataclass(frozen=True)
class Provider:
    """A provider of `PROVIDERS` and, where it is ours, options of ``liger_trainer.apply_liger_kernel``."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Provider:
        """``hf``, ``ours-compile``, ``ours:recompute=cheap,tile_bytes=67108864``; values are JSON, or else text.

        Raises:
            ValueError: an unknown provider, an option without a value, or options of a provider that has none.
        """
        kind, _, rest = text.partition(":")
        if kind not in PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {kind!r}")
        options = {}
        for each in filter(None, rest.split(",")):
            name, equals, value = each.partition("=")
            if not equals:
                raise ValueError(f"an option of a provider must be given as name=value, got {each!r} in {text!r}")
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        if options and not kind.startswith("ours"):
            raise ValueError(f"only ours takes options, got {text!r}")
        return cls(kind, options)

    @property
    def ours(self) -> bool:
        return self.kind.startswith("ours")

    @property
    def compiled(self) -> bool:
        return self.kind.endswith("-compile")

    def import_modules(self) -> None:
        """Import the provider's own package; of Liger-Kernel that replaces nothing yet."""
        if self.kind == "liger-kernel":
            import liger_kernel.transformers  # noqa: F401
        elif self.ours:
            import liger_trainer.patching  # noqa: F401

    def before_model(self, model_type: str, *, own_loss: bool) -> None:
        """What a provider does to the classes, before there is a model.

        ``own_loss``: the loss is computed by a trainer, as TRL's are; of Liger-Kernel the layers alone serve then, as
        with TRL's ``use_liger_kernel``.
        """
        if self.kind == "liger-kernel":
            import liger_kernel.transformers as liger

            options = {"fused_linear_cross_entropy": False, "cross_entropy": False} if own_loss else {}
            getattr(liger, f"apply_liger_kernel_to_{model_type}")(**options)

    def patch(self, model: nn.Module) -> str:
        """Give the model our kernels where the provider is ours; returns the line that says what was replaced."""
        if not self.ours:
            return ""
        import liger_trainer

        return liger_trainer.apply_liger_kernel(model, **self.options).line()

    def compile(self, model: nn.Module) -> None:
        """Compile the model in place where the provider is a compiled one, for its one shape."""
        if self.compiled:
            model.compile(dynamic=False)
