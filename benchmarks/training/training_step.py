"""One optimizer step of a run under a provider, in three phases that can be timed and traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .providers import Provider
from .runs import PREFERENCES, Run
from .shapes import config_of

__all__ = ["PHASES", "TrainingStep", "build", "import_for", "random_batch"]

PHASES = ("forward", "backward", "optimizer")
IGNORE_INDEX = -100
SPAN = 64  # tokens that are ignored together


@dataclass
class TrainingStep:
    """A model, its optimizer, and a way to its loss.

    Attributes:
        model: with the provider's kernels, compiled where the provider is a compiled one.
        optimizer: over the parameters that are trained.
        loss: the forward, which returns a scalar.
        patched: what was replaced, in a line; empty where nothing was.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    patched: str = ""

    def __call__(self) -> Tensor:
        """Run the step; the detached loss, still on its device."""
        with torch.profiler.record_function(PHASES[0]):
            loss = self.loss()
        with torch.profiler.record_function(PHASES[1]):
            loss.backward()
        with torch.profiler.record_function(PHASES[2]):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def persistent_bytes(self) -> int:
        """Bytes of parameters and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [each for each in state.values() if isinstance(each, Tensor)]
        return sum(each.nbytes for each in tensors)


def random_batch(run: Run, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens (batch, length) and their labels, in which spans of 64 tokens are ignored."""
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(vocab_size, (run.batch, run.length), device=device, generator=generator)
    labels = ids.clone()
    if run.ignored:
        spans = -(-run.length // SPAN)
        order = torch.rand(run.batch, spans, device=device, generator=generator).argsort(1).argsort(1)
        ignored = (order < round(run.ignored * spans)).repeat_interleave(SPAN, 1)[:, : run.length]
        labels.masked_fill_(ignored, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels}


def make_model(run: Run, device: torch.device, dtype: torch.dtype) -> Any:
    """The run's model with random weights, in training mode."""
    import transformers

    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config_of(run.shape), dtype=dtype)
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(task_type="CAUSAL_LM", r=run.lora_rank, lora_alpha=16, target_modules="all-linear")
        # Adapters in the weights' dtype: in fp32 every projection would keep its input in fp32 besides.
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return model.train()


def through_trainer(run: Run, provider: Provider) -> bool:
    """Whether one of TRL's trainers computes the loss."""
    return run.task in PREFERENCES or provider.kind == "trl"


def import_for(run: Run, provider: Provider) -> None:
    """Import what :func:`build` needs for the run, which takes longer than many a step and touches no device."""
    import transformers

    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(run.shape))]  # imports the model's own module
    if run.lora_rank:
        import peft  # noqa: F401
    if through_trainer(run, provider):
        from .trl_loss import import_trainer

        import_trainer(run, provider)
    provider.import_modules()


def build(
    run: Run,
    provider: Provider,
    device: torch.device,
    length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> TrainingStep:
    """The step of a run under a provider.

    Args:
        run: what is trained.
        provider: who trains it.
        device: where.
        length: tokens of each sequence in place of the run's.
        dtype: of weights, and with them of activations and the optimizer's state.
    """
    run = run if length is None else replace(run, length=length)
    by_trainer = through_trainer(run, provider)
    provider.before_model(run.shape[0], own_loss=by_trainer)
    model = make_model(run, device, dtype)
    if by_trainer:
        from .trl_loss import trainer_and_loss

        trainer, loss = trainer_and_loss(run, provider, model, device)
        model, patched = trainer.model, ""
        if provider.ours:
            from liger_trainer.patching import is_patched

            patched = f"{type(trainer).__name__}, model patched: {is_patched(model)}"
    else:
        patched = provider.patch(model)
        batch = random_batch(run, run.shape[1]["vocab_size"], device)

        def loss() -> Tensor:
            return model(**batch).loss

    provider.compile(model)
    trained = [each for each in model.parameters() if each.requires_grad]
    return TrainingStep(model, torch.optim.AdamW(trained, lr=1e-5, fused=True), loss, patched)
