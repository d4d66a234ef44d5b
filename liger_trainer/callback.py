"""Callbacks that patch the model of any Hugging Face Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ._config import reject_liger_kernel, resolve_liger_config
from ._environment import DISABLE_VARIABLE, disabled
from ._logging import logger
from .patching import Report, apply_liger_kernel, is_patched, revert
from .patching.exact_outputs import keep_exact

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["ArgumentsCallback", "LigerCallback", "PatchingCallback"]


class PatchingCallback(TrainerCallback):
    """What the callbacks of this file share: patch the Trainer's model when the Trainer is made, patch again if
    ``model_init`` has made a new one by the time training starts, and say on the main process what was done.

    Attributes:
        report: what :func:`liger_trainer.apply_liger_kernel` did to the model; None as long as it did nothing.
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        self._said_disabled = False

    def options(self, args: TrainingArguments) -> dict[str, Any] | None:
        """Keyword options for :func:`liger_trainer.apply_liger_kernel`; None leaves the model alone."""
        raise NotImplementedError

    def announces(self, args: TrainingArguments) -> bool:
        """Whether it is this callback that tells what was done; of two on one Trainer, one does."""
        return True

    def patch(self, model: nn.Module, args: TrainingArguments) -> None:
        """Patch `model` as `args` and this callback ask for, or take patches off under ``LIGER_TRAINER_DISABLE=1``."""
        options = self.options(args)
        if options is None:
            return
        reject_liger_kernel(args)
        model = _unwrap(model)
        if disabled():
            self.report = None
            if is_patched(model):
                revert(model)
        else:
            self.report = apply_liger_kernel(model, **options)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.patch(kwargs["model"], args)
        if self.report is None:
            self._announce(args, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.options(args) is None:
            return
        model = _unwrap(kwargs["model"])
        # Made by model_init, or this callback was added after the Trainer was made.
        if not is_patched(model) or self.report is None:
            self.patch(model, args)
        if not disabled():
            keep_exact(kwargs["model"])
        self._announce(args, state)

    def _announce(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.announces(args) or not state.is_world_process_zero:
            return
        if self.report is not None:
            logger.info(self.report.line())
        elif disabled() and self.options(args) is not None and not self._said_disabled:
            self._said_disabled = True
            setting = f"{DISABLE_VARIABLE}={os.environ.get(DISABLE_VARIABLE)}"
            logger.info("liger_trainer is switched off by %s: the model is left as it is", setting)


class LigerCallback(PatchingCallback):
    """Patches the model of the Trainer that it is given to, whatever that Trainer's arguments are.

    ``Trainer(model, args, callbacks=[LigerCallback()])``

    The model is patched in the Trainer's ``__init__``, so evaluation and prediction without training run on the patched
    model too; a model that ``model_init`` makes for a training is patched when that training begins, sharded or not.
    Taking the callback off a Trainer leaves the model patched; :func:`liger_trainer.revert` restores it.

    Args:
        liger_config: keyword options for :func:`liger_trainer.apply_liger_kernel`, in any spelling that
            ``TrainingArguments.liger_config`` takes. None: the ``liger_config`` of the arguments where they have one,
            else the defaults.

    Raises:
        ValueError, TypeError: an unknown option, or a value of the wrong type (when made); the arguments have
            ``use_liger=True`` and another ``liger_config``, ``use_liger_kernel=True``, or the model has no part that
            can be replaced (when the Trainer is made).
    """

    def __init__(self, liger_config: Mapping[str, Any] | str | None = None) -> None:
        super().__init__()
        self.liger_config: dict[str, Any] | None = None if liger_config is None else resolve_liger_config(liger_config)

    def options(self, args: TrainingArguments) -> dict[str, Any]:
        asked = _asked_by(args)
        if self.liger_config is None:
            return resolve_liger_config(getattr(args, "liger_config", None)) if asked is None else asked
        if asked is not None and asked != self.liger_config:
            raise ValueError(
                f"liger_config is given twice: LigerCallback has {self.liger_config!r}, the arguments with "
                f"use_liger=True have {asked!r}. Leave out one of the two; with use_liger=True the callback is not "
                "needed."
            )
        return self.liger_config

    def announces(self, args: TrainingArguments) -> bool:
        return _asked_by(args) is None


class ArgumentsCallback(PatchingCallback):
    """Stands in every Trainer's default callbacks, and acts only for arguments with ``use_liger=True``.

    No LigerCallback itself, so that ``trainer.remove_callback(LigerCallback)`` finds the one that the user has added.
    """

    def options(self, args: TrainingArguments) -> dict[str, Any] | None:
        return _asked_by(args)


def _asked_by(args: TrainingArguments) -> dict[str, Any] | None:
    # Asked by method, not by field name: other libraries' configs have had a `use_liger` of another meaning.
    ask = getattr(args, "liger_options", None)
    return ask() if callable(ask) else None


def _unwrap(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


if ArgumentsCallback not in DEFAULT_CALLBACKS:
    DEFAULT_CALLBACKS.append(ArgumentsCallback)  # type: ignore[arg-type]  # inferred from its first entry
