"""What the recipes on TRL's trainers share: options, the policy, and held-out figures before and after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig, TrlParser

from .measure import device_name, share_of_cores
from .models import find_model, load_model

NO_FIGURES = ("runtime", "per_second", "num_tokens", "epoch")


@dataclass
class DataOptions:
    """Where the examples come from."""

    train_data: str = field(
        default="recipes/data/dialogues-train.jsonl",
        metadata={"help": "JSON Lines file, or a dataset of the hub as name[:split]."},
    )
    heldout_data: str = field(
        default="recipes/data/dialogues-heldout.jsonl", metadata={"help": "Data to evaluate on, given the same way."}
    )
    heldout_examples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows of it, drawn at random; on all by default."}
    )


def read_options(option_types: Sequence[type], default_config: Path, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """One object of each dataclass, from the command line over the YAML file of ``--config``, by `trl.TrlParser`.

    Args:
        option_types: dataclasses, the last of them a kind of `transformers.TrainingArguments`.
        default_config: the file that serves when ``--config`` names no other.
        argv: the command line without the program's name, ``None`` for ``sys.argv``.

    Returns:
        The objects. The training arguments are set to evaluate before the first step; and on a CPU, of which
        ``accelerate launch`` leaves a process one thread, this process takes its share of the cores.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" not in argv:
        argv = ["--config", str(default_config), *argv]
    options = TrlParser(option_types).parse_args_and_config(argv)
    args: TrainingArguments = options[-1]
    args.eval_on_start = True  # Calling evaluate() before train() would leave the model without its DDP wrapper.
    if args.device.type == "cpu":
        torch.set_num_threads(share_of_cores())
    return options


def load_policy(options: ModelConfig, args: TrainingArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer; fetched by the main process first."""
    with args.main_process_first(desc="finding the model"):
        source = find_model(options.model_name_or_path)
    return load_model(source, options.dtype or "float32", options.attn_implementation)


def show_before_and_after(trainer: Trainer, title: str) -> dict[str, tuple[float, float]]:
    """Evaluate `trainer` after its training, and print every held-out figure beside what it was before.

    Returns:
        ``{name: (before, after)}``, the names without ``eval_``, timings and counts left out; on every process.
    """
    trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    first, last = logged[0], logged[-1]
    figures = {
        name.removeprefix("eval_"): (first[name], last[name])
        for name in last
        if name.startswith("eval_") and name in first and not name.endswith(NO_FIGURES)
    }
    if trainer.is_world_process_zero():
        table = Table()
        table.add_column("held out")
        for name in ("before", "after"):
            table.add_column(name, justify="right")
        for name, values in figures.items():
            table.add_row(name, *[f"{value:.4f}" for value in values])
        console = Console()
        device = device_name(trainer.args.device)
        console.print(f"\n{title} · {device} · {trainer.state.global_step} steps", soft_wrap=True, highlight=False)
        console.print(table)
    return figures
