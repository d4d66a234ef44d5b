"""What turns a trainer of TRL into one whose losses build no logits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from .._environment import disabled
from ..arguments import LigerArguments
from ..callback import LigerCallback
from ..out_of_memory import MemoryAdvice
from ..patching import apply_liger_kernel
from ..patching.exact_outputs import keep_exact
from .fused_forward import HeadOptions, install, one_forward, trl_options

try:
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError:  # then no head has an adapter

    class BaseTunerLayer:  # type: ignore[no-redef]
        pass


__all__ = ["LigerLossMixin", "apply_liger_loss"]


def _causal_lm(model: Any) -> Any:
    """The model of transformers inside wrappers of accelerate and peft."""
    return unwrap_peft_model(extract_model_from_parallel(model, keep_torch_compile=False))


def _has_adapter_on_head(model: Any) -> bool:
    return isinstance(model.get_output_embeddings(), BaseTunerLayer)


def _head_options(trainer: Any, options: HeadOptions) -> HeadOptions:
    config = (trainer.args.liger_options() if isinstance(trainer.args, LigerArguments) else None) or {}
    return replace(
        options,
        tile_bytes=config.get("tile_bytes"),
        cache_bytes=getattr(trainer.args, "logits_cache_bytes", None),
        least_memory=getattr(trainer.args, "least_memory", False),
    )


def apply_liger_loss(trainer: Any) -> Any:
    """Have a TRL trainer that exists already compute its loss without logits, and return it.

    Replaces what stands behind the fused head that TRL's SFT, DPO, KTO, GRPO and RLOO trainers, and subclasses of
    them, gave to their policy and reference. The trainer's own code runs unchanged on top. The layers are another
    matter: :func:`liger_trainer.apply_liger_kernel`. Under ``LIGER_TRAINER_DISABLE=1`` nothing happens.

    Raises:
        ValueError: the trainer's model has no fused head of TRL's, or a head that can't be deferred. Nothing is
            replaced then.
    """
    if disabled():
        return trainer
    outer = [trainer.model]
    if isinstance(getattr(trainer, "ref_model", None), nn.Module):
        outer.append(trainer.ref_model)
    models = [_causal_lm(each) for each in outer]
    found = [(model, trl_options(model)) for model in models]
    for model, fused in found:
        if fused is None:
            raise ValueError(
                f"{type(trainer).__name__} gave its {type(model).__name__} no fused LM head. Use "
                "liger_trainer.trl's trainer of its kind, if there is one."
            )
    originals = [vars(model).get("forward") for model in models]
    try:
        for model, fused in found:
            assert fused is not None
            original, options = fused
            install(model, _head_options(trainer, options), original, trainer.accelerator.autocast)
    except BaseException:
        for model, forward in zip(models, originals, strict=True):
            vars(model)["forward"] = forward
        raise
    for each in outer:
        keep_exact(each)
    trainer.add_callback(_KeepExact())
    return trainer


class _KeepExact(TrainerCallback):
    """For the policy, which is sharded when training starts."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep_exact(kwargs["model"])


class _NoTunerLayer:
    """Stands in for peft's ``BaseTunerLayer`` where TRL asks whether a head is one."""


@contextmanager
def _adapters_allowed_on_heads(trainer: type) -> Iterator[None]:
    """Lift, while a trainer is made, TRL's refusal of adapters on the head, which its own loss would ignore."""
    modules = {sys.modules[each.__module__] for each in trainer.__mro__ if each.__module__.startswith("trl.trainer.")}
    refusing = [module for module in modules if hasattr(module, "BaseTunerLayer")]
    for module in refusing:
        module.BaseTunerLayer = _NoTunerLayer  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in refusing:
            module.BaseTunerLayer = BaseTunerLayer  # type: ignore[attr-defined]


class LigerLossMixin(MemoryAdvice):
    """Base of the trainers of this package, before the one of TRL's.

    The layers of the policy are patched in ``Trainer.__init__``, as by :class:`liger_trainer.LigerTrainer`; when TRL's
    own ``__init__`` is through, its loss is replaced by :meth:`replace_loss`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _adapters_allowed_on_heads(type(self)):
            super().__init__(*args, **kwargs)
        self.take_over()

    def take_over(self) -> None:
        """Replace the loss, once: when TRL's ``__init__`` is through, or inside it, before it scores anything."""
        trainer: Any = self
        if hasattr(self, "uses_liger_loss"):
            return
        asked = trainer.args.use_liger if isinstance(trainer.args, LigerArguments) else True
        self.uses_liger_loss = asked and not disabled()
        if not self.uses_liger_loss:
            if _has_adapter_on_head(_causal_lm(trainer.model)):
                raise ValueError(
                    f"{type(self).__name__} trains an adapter on the LM head with use_liger=True alone, since TRL's "
                    "own loss would ignore it. Set use_liger=True, or take the head out of target_modules."
                )
            return
        if getattr(trainer.args, "cast_lm_head_to_fp32", False) and _has_adapter_on_head(_causal_lm(trainer.model)):
            raise ValueError(
                "cast_lm_head_to_fp32=True replaces the forward of the LM head by one that leaves its adapter out. Set "
                "it to False, or take the head out of target_modules."
            )
        if not isinstance(trainer.args, LigerArguments) and not any(
            isinstance(each, LigerCallback) for each in trainer.callback_handler.callbacks
        ):
            callback = LigerCallback()
            trainer.add_callback(callback)
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        for model in self.references():
            options = trainer.args.liger_options() if isinstance(trainer.args, LigerArguments) else {}
            apply_liger_kernel(model, **{**(options or {}), "fused_linear_cross_entropy": False})
        self.replace_loss()

    def references(self) -> list[nn.Module]:
        """The models beside the policy whose layers are to be patched, so that both round alike in bf16.

        FSDP2 may have them already. Those of FSDP1 and DeepSpeed stay as they are.
        """
        trainer: Any = self
        if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
            return []
        models = [getattr(trainer, name, None) for name in ("ref_model", "teacher_model")]
        return [_causal_lm(each) for each in models if isinstance(each, nn.Module)]

    def replace_loss(self) -> None:
        """Install the loss that builds no logits."""
        apply_liger_loss(self)

    def one_forward(self, fused_too: bool) -> AbstractContextManager[None]:
        """:func:`~.fused_forward.one_forward`, but where a weight is gone after the forward that gathered it."""
        trainer: Any = self
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        return nullcontext() if sharded else one_forward(fused_too)

    def memory_options(self) -> dict[str, Any]:
        """``tile_bytes``, ``cache_bytes`` and ``least_memory`` of the losses."""
        options = _head_options(self, HeadOptions())
        return {name: getattr(options, name) for name in ("tile_bytes", "cache_bytes", "least_memory")}

    def install_heads(self, *models: nn.Module) -> None:
        """Give models that TRL gave no fused head a forward that can do without logits."""
        trainer: Any = self
        for model in models:
            install(_causal_lm(model), _head_options(trainer, HeadOptions()), None, trainer.accelerator.autocast)
