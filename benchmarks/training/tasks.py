"""Short trainings on real text: fine-tuning, DPO and distillation, each under transformers' or TRL's own trainer."""

from __future__ import annotations

import copy
import importlib
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from support.chats import load_chats
from support.models import find_model, load_model
from support.preferences import load_pairs
from support.students import fewer_layers

__all__ = ["CURVES", "PROVIDERS", "TASKS", "Training", "curves", "make_trainer"]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIALOGUES = "recipes/data/dialogues-train.jsonl"
PROVIDERS = ("hf", "liger-kernel", "ours")
# What is compared, by task: names in the trainer's log.
CURVES = {"sft": ("loss",), "dpo": ("loss", "rewards/margins"), "distillation": ("loss",)}
LEARNING_RATES = {"sft": 5e-5, "dpo": 5e-6, "distillation": 1e-4}


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        task: of `TASKS`.
        provider: ``"hf"`` for the stock trainer, of transformers or TRL, alone; ``"liger-kernel"`` for the same with
            ``use_liger_kernel=True``; ``"ours"``.
        seed: of the order of the data; the weights begin the same.
        steps, batch, length: optimizer steps, sequences (or pairs) of a step, tokens of a sequence at most.
        bf16: autocast over fp32 weights.
        model: a model of the hub, a folder, or a ``.gguf`` file.
        text: for fine-tuning, a UTF-8 file; without one, the sources of Python's standard library.
        student_layers: for distillation, the layers of the model that the student keeps.
        options: more arguments of the trainer.
    """

    task: str
    provider: str
    seed: int = 0
    steps: int = 500
    batch: int = 8
    length: int = 256
    bf16: bool = False
    model: str = MODEL
    text: str | None = None
    student_layers: int = 20
    options: tuple[tuple[str, Any], ...] = ()


def read_text(file: str | None, characters: int) -> str:
    """So many characters of the file, or of the modules of Python's standard library in alphabetical order."""
    files = [Path(file)] if file else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = ""
    for each in files:
        text += each.read_text(encoding="utf-8", errors="replace")
        if len(text) >= characters:
            break
    return text[:characters]


def rows_of_text(training: Training, tokenizer: Any) -> Dataset:
    """Rows of exactly ``length`` tokens, as many as the training takes or the text has."""
    wanted = training.steps * training.batch
    ids = tokenizer(read_text(training.text, 6 * wanted * training.length), verbose=False)["input_ids"]
    starts = range(0, min(len(ids) // training.length, wanted) * training.length, training.length)
    rows = [ids[start : start + training.length] for start in starts]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def sft(training: Training, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    from transformers import Trainer, default_data_collator

    from liger_trainer import LigerTrainer, TrainingArguments

    trainer = LigerTrainer if arguments["use_liger"] else Trainer
    return trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows_of_text(training, tokenizer),
        data_collator=default_data_collator,
    )


def trl_trainer(module: str, name: str, arguments: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A trainer's class and its arguments: TRL's, from its module, or ours of that name."""
    if arguments["use_liger"]:
        module, name = "liger_trainer.trl", f"Liger{name}"
    else:  # TRL's configs don't know our arguments
        arguments = {key: value for key, value in arguments.items() if key not in ("use_liger", "liger_config")}
    home = importlib.import_module(module)
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")(**arguments, **options)


def dpo(training: Training, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    trainer, args = trl_trainer("trl", "DPO", arguments, max_length=training.length, beta=0.1)
    return trainer(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=load_pairs(DIALOGUES, ROOT, seed=0),
        processing_class=tokenizer,
    )


def distillation(training: Training, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    options = {"max_length": training.length, "beta": 0.5, "lmbda": 0.0}
    trainer, args = trl_trainer("trl.experimental.gkd", "GKD", arguments, **options)

    def fits(row: dict[str, Any]) -> bool:  # GKD's collator cuts from the start, and refuses a chat without its prompt
        return len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) <= training.length

    return trainer(
        fewer_layers(model, training.student_layers),
        model,
        args=args,
        train_dataset=load_chats(DIALOGUES, ROOT).filter(fits),
        processing_class=tokenizer,
    )


TASKS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo, "distillation": distillation}


def make_trainer(training: Training, output: str) -> Any:
    """The trainer, ready to train."""
    model, tokenizer = load_model(find_model(training.model), "float32", None)
    arguments = {
        "output_dir": output,
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch,
        "learning_rate": LEARNING_RATES[training.task],
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, training.steps // 20),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # which would log a NaN as 0
        "save_strategy": "no",
        "report_to": [],
        "seed": training.seed,
        "bf16": training.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "use_liger": training.provider == "ours",
        "use_liger_kernel": training.provider == "liger-kernel",
        **dict(training.options),
    }
    return TASKS[training.task](training, model, tokenizer, arguments)


def curves(training: Training) -> dict[str, list[float]]:
    """Train, and return what `CURVES` names, one number a step."""
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(training, output)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in logged] for name in CURVES[training.task]}
