"""Losses through TRL's trainers, theirs and ours, on sequences of random tokens of one length."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .providers import Provider
from .runs import Run

__all__ = ["import_trainer", "trainer_and_loss"]

# Task: TRL's module, the name of its trainer, options of its config. SimPO is CPO's trainer with another loss.
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("trl", "SFT", {"packing": False}),
    "dpo": ("trl", "DPO", {}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
}
OURS = {"simpo": "SimPO"}


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token: ``w3`` and on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="w3")


def preference_pairs(run: Run, vocab_size: int) -> Dataset:
    """As many pairs as the batch, each answer so long that `max_length` cuts the sequence to the run's length."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, vocab_size, (count,), generator=generator).tolist())

    prompt = max(1, round(run.ignored * run.length))
    rows = [
        {"prompt": words(prompt), "chosen": " " + words(run.length), "rejected": " " + words(run.length)}
        for _ in range(run.batch)
    ]
    return Dataset.from_list(rows)


def token_rows(run: Run, vocab_size: int) -> Dataset:
    """Rows with ``input_ids`` and ``labels``, as every other provider gets them."""
    from .training_step import random_batch

    batch = random_batch(run, vocab_size, torch.device("cpu"))
    return Dataset.from_list([dict(zip(batch, row, strict=True)) for row in zip(*(x.tolist() for x in batch.values()))])


def import_trainer(run: Run, provider: Provider) -> tuple[type, type]:
    """The trainer of the run's task and its config: liger_trainer's where the provider is ours, else TRL's own."""
    module, name, _ = TRAINERS[run.task]
    if provider.ours:
        module, name = "liger_trainer.trl", f"Liger{OURS.get(run.task, name)}"
    home = importlib.import_module(module)
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


def trainer_and_loss(
    run: Run, provider: Provider, model: Any, device: torch.device
) -> tuple[Any, Callable[[], Tensor]]:
    """A trainer of the run's task, and the forward of its one batch.

    Where the provider is ours, the trainer is liger_trainer's of that task, and patches the model; else TRL's own.
    """
    make_trainer, make_config = import_trainer(run, provider)
    options = TRAINERS[run.task][2]
    if provider.ours:
        options = {**options, "use_liger": True, "liger_config": provider.options}
    vocab_size = run.shape[1]["vocab_size"]
    args = make_config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=run.batch,
        max_length=run.length,
        bf16=False,  # the weights are bf16, without autocast
        gradient_checkpointing=run.checkpointing,
        use_cpu=device.type == "cpu",
        report_to=[],
        **options,
    )
    trainer = make_trainer(
        model,
        args=args,
        train_dataset=token_rows(run, vocab_size) if run.task == "sft" else preference_pairs(run, vocab_size),
        processing_class=tokenizer(vocab_size),
        **({"ref_model": copy.deepcopy(model)} if run.task == "dpo" else {}),
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def loss() -> Tensor:
        return trainer.compute_loss(trainer.model, batch)

    return trainer, loss
