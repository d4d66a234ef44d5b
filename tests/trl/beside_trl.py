"""A trainer of ours beside TRL's own: the same tiny model, data and seed, five optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import HIDDEN, VOCAB, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from wide_tensors import wide_tensors

STEPS = 5
slow = pytest.mark.slow
TILE_ROWS = 5  # of the tiles of logits, and of what is kept of them
ROW_BYTES = VOCAB * 4

# What is about the run and not about the model.
NOT_COMPARED = ("runtime", "samples_per_second", "steps_per_second", "total_flos", "step_time")


TEMPLATE = (
    "{% for m in messages %}{{ 'w5 ' if m.role == 'user' else 'w6 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w6 {% endif %}"
)


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One word a token: ``w3`` to ``w210``; with ``chat``, a template for messages."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="w3",
        **({"chat_template": TEMPLATE} if chat else {}),
    )


def words(generator: torch.Generator, length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def pairs(count: int = 20) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": words(generator, 3 + i % 3),
            "chosen": " " + words(generator, 4 + i % 5),
            "rejected": " " + words(generator, 3 + i % 4),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def unpaired(count: int = 20) -> Dataset:
    rows = pairs(count).to_list()
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
            for i, row in enumerate(rows)
        ]
    )


def chats(count: int = 20) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": words(generator, 3 + i % 3)},
                {"role": "assistant", "content": words(generator, 4 + i % 5)},
            ]
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def arguments(config: type, tmp_path: Any, **options: Any) -> Any:
    common = {
        "output_dir": str(tmp_path),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "adam_epsilon": 1e-5,  # else a step follows the sign of a gradient, however small
    }
    if "use_liger" in {field.name for field in fields(config)}:
        common |= {
            "liger_config": {"tile_bytes": TILE_ROWS * ROW_BYTES},
            "logits_cache_bytes": TILE_ROWS * ROW_BYTES,
        }
    return config(**{**common, **options})


def logged(trainer: Any) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if not name.endswith(NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def deviation(ours: Any, theirs: Any, *, rel: float = 1e-4) -> str:
    """Where two trained trainers differ in what they logged, in what a run put into ``seen``, or in a parameter."""
    entries = [[*logged(each), getattr(each, "seen", {})] for each in (ours, theirs)]
    if not len(entries[0]) == len(entries[1]) > STEPS:
        return f"{len(entries[0])} entries are logged, not {len(entries[1])}"
    for one, two in zip(*entries, strict=True):
        if one.keys() != two.keys():
            return f"only one of them logs {sorted(one.keys() ^ two.keys())}"
        # A divergence is the difference of two log-probabilities of tens of nats, each rounded in fp32.
        rounding = 2**-22 * max((abs(value) for name, value in two.items() if "logps" in name), default=0.0)
        for name, value in two.items():
            smallest = max(2e-6, rounding if name.endswith("kl") else 0.0)
            if one[name] != pytest.approx(value, rel=rel, abs=smallest, nan_ok=True):
                return f"{name} is {one[name]}, not {value}"
    parameters = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        difference = (parameter - parameters[name]).abs().max()
        if not difference <= 1e-5 * max(1.0, parameters[name].abs().max()):
            return f"{name} differs by {float(difference):.1e}"
    return ""


def assert_same_run(ours: Any, theirs: Any, *, rel: float = 1e-4) -> None:
    """Everything that two trained trainers logged agrees, and so do their parameters."""
    differs = deviation(ours, theirs, rel=rel)
    assert not differs, differs


def run_beside(
    trainers: tuple[type, type],
    configs: tuple[type, type],
    data: Dataset,
    tmp_path: Any,
    *,
    model: Callable[[], nn.Module] = tiny_llama,
    trainer_options: Callable[[], dict[str, Any]] = dict,
    widest: int | None = TILE_ROWS,
    transposed_width: int = HIDDEN,
    **options: Any,
) -> tuple[Any, Any]:
    """Train ours, then TRL's, compare them, and return both; ``widest`` bounds the rows of ours' logits."""
    results = []
    for trainer, config in zip(trainers, configs, strict=True):
        torch.manual_seed(0)
        made = trainer(
            model=model(),
            args=arguments(config, tmp_path, **options),
            train_dataset=copy.deepcopy(data),
            processing_class=tokenizer(),
            **trainer_options(),
        )
        if trainer is trainers[0] and widest is not None:
            with wide_tensors(VOCAB, rows=widest, hidden_size=HIDDEN) as found:
                made.train()
            found = [
                each for each in found if each[1] != (transposed_width, VOCAB)
            ]  # another head's weight, transposed
            assert not found, found[:3]
        else:
            made.train()
        results.append(made)
    assert_same_run(*results)
    return tuple(results)
