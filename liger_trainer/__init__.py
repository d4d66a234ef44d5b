"""Fused kernels for Hugging Face Trainer and TRL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import LigerArguments, TrainingArguments
    from .auto import AutoLigerKernelForCausalLM
    from .callback import LigerCallback
    from .patching import Report, apply_liger_kernel, is_patched, plan, revert
    from .trainer import LigerTrainer

__all__ = [
    "AutoLigerKernelForCausalLM",
    "LigerArguments",
    "LigerCallback",
    "LigerTrainer",
    "Report",
    "TrainingArguments",
    "apply_liger_kernel",
    "is_patched",
    "plan",
    "revert",
]

__version__ = "0.1.0"

# Imported on first use: kernels, modules and losses serve plain PyTorch loops, where transformers may be missing.
_HOME = {
    "AutoLigerKernelForCausalLM": "auto",
    "LigerArguments": "arguments",
    "LigerCallback": "callback",
    "LigerTrainer": "trainer",
    "Report": "patching",
    "TrainingArguments": "arguments",
    "apply_liger_kernel": "patching",
    "is_patched": "patching",
    "plan": "patching",
    "revert": "patching",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name.startswith("AutoLigerKernelFor"):
        value = importlib.import_module(".auto", __name__).auto_class(name)
    elif name.startswith("apply_liger_kernel_to_"):
        value = importlib.import_module(".patching.by_type", __name__).apply_to(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
