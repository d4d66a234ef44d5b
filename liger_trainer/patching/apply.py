"""``apply_liger_kernel``, ``revert`` and ``plan``: deciding first, replacing afterwards, and undoing.

A patch lives in the classes of the modules that it replaced, and in :data:`_patches` while its model lives. Copies of
a patched model are patched by their classes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._environment import disabled
from . import class_swap, experts, lm_head, mlp, norm, rotary
from .options import Options
from .recogniser import Recogniser, Replacement, Skip, apply_all
from .report import LeftAlone, Replaced, Report

__all__ = ["RECOGNISERS", "apply_liger_kernel", "is_patched", "plan", "revert"]

RECOGNISERS: list[Recogniser] = [norm, mlp, experts, rotary, lm_head]


@dataclass(frozen=True)
class _Patch:
    options: Options
    replacements: tuple[Replacement, ...]
    report: Report

    @property
    def in_force(self) -> bool:
        return all(replacement.in_force for replacement in self.replacements)


_patches: weakref.WeakKeyDictionary[nn.Module, _Patch] = weakref.WeakKeyDictionary()


def apply_liger_kernel(model: nn.Module, **options: Any) -> Report:
    """Replace, in this model alone, the parts that fused kernels compute.

    Norms, gated MLPs, rotary functions and the LM head with its loss are recognised by what they compute; the model's
    type plays no part. Each candidate runs on random input against its replacement, output and gradients; where they
    disagree the part is left alone and the report says why. Parameters, ``state_dict`` keys, hooks, class names and
    the saved config stay as they are. Nothing is replaced before all is decided, and an error on the way leaves the
    model as it was. Applying again with the same options changes nothing; with others, the model is reverted first.

    Args:
        model: any module that holds a model, as a ``PreTrainedModel`` or a ``PeftModel``.
        **options: see :class:`liger_trainer.patching.options.Options`.

    Returns:
        What was replaced, and what was left alone and why. Under ``LIGER_TRAINER_DISABLE=1`` nothing is, an earlier
        patch is taken off, and the report is empty.

    Raises:
        TypeError: model is no module, an option is unknown or has the wrong type.
        ValueError: contradicting options, or a model without a part that can be replaced.
    """
    parsed = _checked(model, options)
    if disabled():
        revert(model)
        return Report()
    patch = _patches.get(model)
    if patch is not None and not patch.in_force:
        patch = None
    if patch is not None and patch.options == parsed:
        return patch.report
    replacements, report = _decide(model, parsed)
    if not replacements:
        raise ValueError(
            f"{type(model).__name__} has no part that liger_trainer can replace with the given options"
            + "".join(f"; {entry.path or 'the model'} ({entry.class_name}): {entry.reason}" for entry in report.skipped)
        )
    revert(model)
    try:
        apply_all(replacements)
    except BaseException:
        if patch is not None:
            apply_all(patch.replacements)
            _patches[model] = patch
        raise
    _patches[model] = _Patch(parsed, tuple(replacements), report)
    return report


def plan(model: nn.Module, **options: Any) -> Report:
    """What :func:`apply_liger_kernel` would do with the same arguments, without touching the model.

    Raises:
        TypeError, ValueError: as :func:`apply_liger_kernel`, except that a model without recognisable part gives an
            empty report.
    """
    return _decide(model, _checked(model, options))[1]


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_liger_kernel` in model and in everything inside it, and return model.

    Works on copies of a patched model and on models that were wrapped since; without effect on an unpatched one.

    Raises:
        TypeError: model is no module.
        RuntimeError: a replaced part was given another class since, as FSDP2 does.
    """
    _check_module(model)
    for module in model.modules():
        patch = _patches.pop(module, None)
        if patch is not None:
            for replacement in reversed(patch.replacements):
                replacement.revert()
    for module in model.modules():
        class_swap.unswap(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether a part of model is replaced.

    Raises:
        TypeError: model is no module.
    """
    _check_module(model)
    return any(
        class_swap.is_swapped(module) or ((patch := _patches.get(module)) is not None and patch.in_force)
        for module in model.modules()
    )


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _checked(model: Any, options: dict[str, Any]) -> Options:
    _check_module(model)
    return Options.parse(options)


def _decide(model: nn.Module, options: Options) -> tuple[Sequence[Replacement], Report]:
    replacements: list[Replacement] = []
    skipped: list[LeftAlone] = []
    claimed: dict[str, str] = {}
    for recogniser in RECOGNISERS:
        for found in recogniser.recognise(model, options):
            if isinstance(found, Skip):
                skipped.append(LeftAlone(found.kind, found.path, found.class_name, found.reason))
            elif found.path in claimed:
                reason = f"replaced as {claimed[found.path]} already"
                skipped.append(LeftAlone(found.kind, found.path, found.class_name, reason))
            else:
                claimed[found.path] = found.kind
                replacements.append(found)
    replaced = tuple(Replaced(r.kind, r.path, r.class_name, r.kernel) for r in replacements)
    return replacements, Report(replaced, tuple(skipped))
