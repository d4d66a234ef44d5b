"""``apply_liger_kernel``, ``revert`` and ``plan``: deciding first, replacing afterwards, and undoing.

A patch lives in the classes of the modules that it replaced, and in :data:`_patches` while its model lives. Copies of
a patched model are patched by their classes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from .._environment import disabled
from .._logging import logger
from . import class_swap, experts, gelu, lm_head, lora, mlp, norm, recompute, residual, rotary
from .memory import bytes_saved
from .options import Options
from .recogniser import Recogniser, Replacement, Skip, apply_all
from .report import LeftAlone, Replaced, Report, dtype_names

__all__ = ["RECOGNISERS", "apply_liger_kernel", "is_patched", "plan", "revert"]

RECOGNISERS: list[Recogniser] = [norm, mlp, gelu, experts, rotary, lora, lm_head, recompute]


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
    if parsed.check and any(parameter.is_meta for parameter in model.parameters()):
        model.register_forward_pre_hook(_verify_where_it_runs)
    return report


def _verify_where_it_runs(model: nn.Module, inputs: Any) -> None:
    """A hook before the first forward of a model that was patched without weights, so perhaps for another device.

    Each kind of part is compared again with its original, and goes back to it where they differ by now.
    """
    if torch.compiler.is_compiling():
        return
    _forget_hook(model)
    patch = _patches.get(model)
    verified: dict[Any, str | None] = {}
    for replacement in patch.replacements if patch is not None else ():
        module = model.get_submodule(replacement.path)
        kind = (type(module), *(p.dtype for p in module.parameters()), *(p.shape for p in module.parameters()))
        if kind not in verified and replacement.verify is not None:
            verified[kind] = replacement.verify()
        reason = verified.get(kind)
        # An original that does not run by itself any more, as when FSDP1 has flattened its weights, tells nothing.
        if reason is not None and not reason.startswith("its forward") and replacement.in_force:
            replacement.revert()
            logger.warning(
                "%s %s (%s) is left alone after all: %s",
                replacement.kind, replacement.path, replacement.class_name, reason,
            )  # fmt: skip


def _forget_hook(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _verify_where_it_runs:
            del model._forward_pre_hooks[key]


def plan(model: nn.Module, *, batch: int | None = None, length: int | None = None, **options: Any) -> Report:
    """What :func:`apply_liger_kernel` would do with the same arguments, without touching the model.

    Works on a model on the meta device, so without weights.

    Args:
        model: as for :func:`apply_liger_kernel`.
        batch, length: rows and tokens a row of a training step, for which the report then says what memory each part
            saves: what is kept for the backward pass, and for the LM head the logits. Given together or not at all.
        **options: as for :func:`apply_liger_kernel`.

    Raises:
        TypeError, ValueError: as :func:`apply_liger_kernel`, except that a model without recognisable part gives an
            empty report; batch or length below 1, or one without the other.
    """
    parsed = _checked(model, options)
    if (batch is None) != (length is None):
        raise ValueError(f"batch and length are given together or not at all, got batch={batch}, length={length}")
    for name, value in (("batch", batch), ("length", length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return _decide(model, parsed, None if batch is None or length is None else (batch, length))[1]


@overload
def revert(model: nn.Module) -> nn.Module: ...
@overload
def revert(model: str) -> None: ...
def revert(model: nn.Module | str) -> nn.Module | None:
    """Undo :func:`apply_liger_kernel` in model and in everything inside it, and return model.

    Works on copies of a patched model and on models that were wrapped since; without effect on an unpatched one. With
    a model type, as ``"llama"``, models of that type that are made from now on are no longer patched, as
    ``apply_liger_kernel_to_llama()`` had asked; returns None then.

    Raises:
        TypeError: model is neither a module nor a string.
        ValueError: transformers has no such type.
        RuntimeError: a replaced part was given another class since, as FSDP2 does.
    """
    if isinstance(model, str):
        from .by_type import unregister

        unregister(model)
        return None
    _check_module(model)
    for module in model.modules():
        _forget_hook(module)
        recompute.remove(module)
        residual.remove(module)
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


def _decide(
    model: nn.Module, options: Options, step: tuple[int, int] | None = None
) -> tuple[Sequence[Replacement], Report]:
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
    saved: dict[Any, int] = {}
    entries = []
    for each in replacements:
        saves = None
        if step is not None and each.trial is not None:
            # Of equal parts, of which a mixture may have thousands, one is tried. (A norm's name says of what.)
            shapes = tuple(parameter.shape for parameter in model.get_submodule(each.path).parameters())
            key = (each.kind, each.class_name, each.kernel, each.path.rpartition(".")[2], shapes)
            if key not in saved:
                saved[key] = bytes_saved(each.trial(*step))
            saves = saved[key]
        checked = dtype_names(each.checked)
        entries.append(Replaced(each.kind, each.path, each.class_name, each.kernel, checked, saves))
    return replacements, Report(tuple(entries), tuple(skipped), *(step or ()))
