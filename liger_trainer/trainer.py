"""The Hugging Face Trainer with what a callback cannot do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

from .arguments import LigerArguments
from .callback import LigerCallback, PatchingCallback
from .out_of_memory import MemoryAdvice
from .patching.deferred_logits import label_smoothing

__all__ = ["LigerTrainer"]


class LigerTrainer(MemoryAdvice, Trainer):
    """``transformers.Trainer`` on liger_trainer's kernels.

    ``LigerTrainer(model, TrainingArguments("out", use_liger=True), train_dataset=data)``

    Arguments that have the field ``use_liger`` decide with it; any others (``transformers.TrainingArguments``, none)
    can't, and the model is patched with the defaults. Beyond what :class:`liger_trainer.LigerCallback` does for the
    stock Trainer,

    - models that ``model_init`` makes are patched before they are wrapped or sharded;
    - ``label_smoothing_factor`` is applied inside the fused cross entropy, where the stock Trainer would build the
      logits and their log-softmax. It is the same quantity: (1 - e) * nll + e * mean over the vocabulary of -log p,
      over the tokens counted. Where it might not be (a loss other than the causal one, ``shift_labels`` in the batch,
      a mixture's router loss, ``torch_compile``, ``nn.DataParallel``), the stock computation runs;
    - a step that runs out of memory says which settings would help.

    Parameters are those of ``transformers.Trainer``.
    """

    def __init__(self, model: PreTrainedModel | nn.Module | None = None, args: Any = None, *rest: Any, **kwargs: Any):
        super().__init__(model, args, *rest, **kwargs)
        if not isinstance(self.args, LigerArguments) and not any(
            isinstance(each, LigerCallback) for each in self.callback_handler.callbacks
        ):
            callback = LigerCallback()
            self.add_callback(callback)
            callback.on_init_end(self.args, self.state, self.control, model=self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        # Trainer.__init__ calls this before it has callbacks; on_init_end patches that first model.
        for each in self.callback_handler.callbacks if hasattr(self, "callback_handler") else ():
            if isinstance(each, PatchingCallback):
                each.patch(model, self.args)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        smoother = self.label_smoother
        if smoother is None or not self._model_smooths_alike(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.label_smoother = None  # with one, Trainer.compute_loss takes the labels out of the inputs
        try:
            with label_smoothing(smoother.epsilon) as smoothed:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother
        if smoothed.applied:
            return result
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _model_smooths_alike(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether the model's own loss, smoothed, is what ``LabelSmoother`` would compute from its logits."""
        if "labels" not in inputs or "shift_labels" in inputs or self.compute_loss_func is not None:
            return False
        if not self.model_accepts_loss_kwargs or self.args.torch_compile or self.args.n_gpu > 1:
            return False
        causal_lm = unwrap_peft_model(self.accelerator.unwrap_model(model))
        if (
            causal_lm._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            or getattr(causal_lm, "loss_function", None) is not ForCausalLMLoss
            or "loss_function" not in inspect.unwrap(type(causal_lm).forward).__code__.co_names
        ):
            return False
        # With labels, a mixture adds its router loss to the one that it returns.
        routes = getattr(causal_lm.config.get_text_config(), "output_router_logits", False)
        return not inputs.get("output_router_logits", routes)
