"""Every trainer with every feature, five steps beside TRL's own: ``python tests/trl/feature_matrix.py``.

Without ``--trainers`` and ``--features`` the table in docs/trl.md is written. A cell is one of

- ``same``: all that was logged and all parameters agree, and no tensor was as wide as the vocabulary with more rows
  than a tile; ``same, logits`` where there was one, which only features that hand logits to the user's code may have;
- ``refused``: TRL's trainer raises, and so does ours when it is made;
- ``TRL fails``: TRL's trainer raises, ours runs;
- ``different``: what must not be, and makes the exit status 1;
- ``–``: TRL's trainer has no such option.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside_trl import TILE_ROWS, arguments, chats, deviation, pairs, tokenizer, unpaired
from datasets import Dataset
from on_logits import on_logits
from peft import LoraConfig, PromptTuningConfig, TaskType
from tiny_models import HIDDEN, TINY, VOCAB, sequences, tiny_llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from wide_tensors import wide_tensors

from liger_trainer import trl as ours
from liger_trainer.kernels import _tiles

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"

__all__ = ["FEATURES", "TRAINERS", "Result", "run"]


def answers() -> Dataset:
    return Dataset.from_list(
        [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    )


def prompts() -> Dataset:
    return pairs().select_columns(["prompt"])


def evenness(completions, **_):
    """Rewards answers for their even words."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in each.split() if word[1:].isdigit())) for each in completions]


@dataclass(frozen=True)
class Trainer:
    ours: str
    stock: type
    config: type
    data: Callable[[], Dataset]
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Callable[[int], Any]], dict[str, Any]] = lambda model: {}
    samples: bool = False  # loads its model from a path, and samples


def _reference(model):
    return {"ref_model": model(1)}


def _teacher(model):
    return {"teacher_model": tiny_llama(1, hidden_size=48, num_hidden_layers=1)}


SAMPLING = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_completion_length": 6,
    "temperature": 0.9,
    "learning_rate": 1e-3,
}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0}
TRAINERS = {
    "SFT": Trainer("SFT", SFTTrainer, SFTConfig, answers),
    "DPO": Trainer("DPO", DPOTrainer, DPOConfig, pairs, extra=_reference),
    "KTO": Trainer("KTO", KTOTrainer, KTOConfig, unpaired, extra=_reference),
    "GRPO": Trainer("GRPO", GRPOTrainer, GRPOConfig, prompts, SAMPLING, lambda _: {"reward_funcs": evenness}, True),
    "RLOO": Trainer("RLOO", RLOOTrainer, RLOOConfig, prompts, SAMPLING, lambda _: {"reward_funcs": evenness}, True),
    "ORPO": Trainer("ORPO", ORPOTrainer, ORPOConfig, pairs, {"max_length": 16}),
    "CPO": Trainer("CPO", CPOTrainer, CPOConfig, pairs, {"max_length": 16}),
    "SimPO": Trainer("SimPO", CPOTrainer, CPOConfig, pairs, {"max_length": 16, **SIMPO}),
    "GKD": Trainer("GKD", GKDTrainer, GKDConfig, chats, {"lmbda": 0.0, "max_length": 16}, _teacher),
    "Distillation": Trainer(
        "Distillation",
        DistillationTrainer,
        DistillationConfig,
        prompts,
        {"max_completion_length": 6, "temperature": 0.9, "learning_rate": 1e-3, "per_device_eval_batch_size": 4},
        _teacher,
    ),
}


def built(cls: type, config: type, **options: Any) -> Callable[[int], Any]:
    def make(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return cls(config(**{**TINY, **options}))

    return make


def likelihood(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, of which cross entropy is all that it takes from the logits."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1), reduction="sum")
    return 0.5 * loss / num_items_in_batch


def squares(outputs, labels, num_items_in_batch=None):
    """One that computes with the logits themselves."""
    return 1e-3 * outputs.logits.square().mean() + likelihood(outputs, labels, num_items_in_batch)


def largest(prediction):
    """Of whatever a trainer hands to metrics: the mean of the largest number in a row."""
    predictions = prediction.predictions
    return {"largest": float(np.asarray(predictions, dtype=np.float64).max(-1).mean())}


def chosen_class(prediction):
    return {"mean_class": float(np.asarray(prediction.predictions, dtype=np.float64).mean())}


@dataclass(frozen=True)
class Feature:
    """What is different from the plain run; ``only`` names the trainers that TRL gives it to."""

    words: str
    model: Callable[[int], Any] = tiny_llama
    options: dict[str, Any] = field(default_factory=dict)
    of_trainer: dict[str, dict[str, Any]] = field(default_factory=dict)  # options by trainer
    peft: Callable[[], Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = tuple(TRAINERS)
    evaluates: bool = False
    outputs: bool = False
    logits: bool = False  # the user's code reads them
    on_logits: tuple[str, ...] = ()  # trainers of TRL's that would ignore part of the head, or not know the tokens


def _lora(**options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(r=4, lora_alpha=8, task_type=TaskType.CAUSAL_LM, **options)


ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
WITH_METRICS = ("SFT", "DPO", "KTO", "ORPO", "CPO", "SimPO", "GKD")
FEATURES = {
    "plain": Feature("nothing further"),
    "lora": Feature("LoRA on layers", peft=_lora(target_modules=["q_proj", "up_proj"])),
    "lora-head": Feature("LoRA on `lm_head` too", peft=_lora(**ON_HEAD), on_logits=tuple(TRAINERS)),
    "dora-head": Feature("DoRA on `lm_head` too", peft=_lora(use_dora=True, **ON_HEAD), on_logits=tuple(TRAINERS)),
    "saved-head": Feature(
        '`modules_to_save=["lm_head"]`', peft=_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "tokens": Feature(
        "`trainable_token_indices` on `lm_head`",
        peft=_lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 17, 200]}),
        on_logits=tuple(TRAINERS),
    ),
    "prompt-tuning": Feature(
        "prompt tuning",
        peft=lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
        on_logits=("ORPO", "CPO", "SimPO", "GKD"),
    ),
    "tied": Feature("tied embeddings", model=lambda seed=0: tiny_llama(seed, tie_word_embeddings=True)),
    "moe": Feature(
        "mixture with its router loss (Mixtral)",
        model=built(
            MixtralForCausalLM, MixtralConfig, num_local_experts=3, output_router_logits=True, router_aux_loss_coef=0.05
        ),
        only=tuple(name for name in TRAINERS if name != "Distillation"),
    ),
    "gemma2": Feature(
        "soft-capped logits (Gemma 2)",
        model=built(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=3.0),
    ),
    "granite": Feature("divided logits (Granite)", model=built(GraniteForCausalLM, GraniteConfig, logits_scaling=2.5)),
    "cohere": Feature("scaled logits (Cohere)", model=built(CohereForCausalLM, CohereConfig, logit_scale=0.3)),
    "accumulation": Feature("gradient accumulation", options={"gradient_accumulation_steps": 2}),
    "evaluation": Feature("evaluation", evaluates=True),
    "smoothing": Feature(
        "label smoothing",
        of_trainer={
            "SFT": {"label_smoothing_factor": 0.1},
            "DPO": {"loss_type": "robust", "label_smoothing": 0.1},
            "CPO": {"label_smoothing": 0.1},
            "SimPO": {"label_smoothing": 0.1},
        },
        only=("SFT", "DPO", "CPO", "SimPO"),
    ),
    "loss-func": Feature(
        "`compute_loss_func`, of cross entropy", extra={"compute_loss_func": likelihood}, only=("SFT",)
    ),
    "loss-func-logits": Feature(
        "`compute_loss_func`, of the logits", extra={"compute_loss_func": squares}, only=("SFT",), logits=True
    ),
    "metrics": Feature(
        "`compute_metrics` of logits",
        extra={"compute_metrics": largest},
        only=WITH_METRICS,
        evaluates=True,
        logits=True,
    ),
    "metrics-argmax": Feature(
        "`compute_metrics` of their argmax",
        extra={
            "compute_metrics": chosen_class,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
        only=("SFT", "GKD"),
        evaluates=True,
    ),
    "return-outputs": Feature("`return_outputs=True`", only=WITH_METRICS, outputs=True, logits=True),
    "precomputed": Feature("precomputed reference", options={"precompute_ref_log_probs": True}, only=("DPO", "KTO")),
    "least-memory": Feature(
        "`least_memory=True`",
        of_trainer={name: {"least_memory": True, "logits_cache_bytes": None} for name in TRAINERS},
        only=tuple(name for name in TRAINERS if name not in ("GKD", "Distillation")),
    ),
    "padding-free": Feature("padding-free batches", options={"padding_free": True, "max_length": None}, only=("SFT",)),
    "packing": Feature("packing", options={"packing": True, "max_length": 32}, only=("SFT",)),
}


@dataclass
class Result:
    trainer: str
    feature: str
    outcome: str
    words: str = ""
    tiles: int = 0
    seconds: float = 0.0


@contextmanager
def counted_tiles() -> Iterator[list[int]]:
    """Collect in how many tiles, beside what is kept, each pass over a head went."""
    counts: list[int] = []
    original = _tiles.tiles

    def counting(*args: Any) -> Iterator[tuple[int, int]]:
        ranges = list(original(*args))
        counts.append(len(ranges))
        return iter(ranges)

    _tiles.tiles = counting
    try:
        yield counts
    finally:
        _tiles.tiles = original


def _of_outputs(outputs: Any) -> Any:
    """Logits, or what else a trainer returns for outputs, as numbers."""
    if isinstance(outputs, dict) and "logits" not in outputs:
        return {name: float(value) for name, value in outputs.items()}
    return outputs.logits.detach().to(torch.float64)


def _train(
    cls: type,
    config: type,
    trainer: Trainer,
    feature: Feature,
    folder: Path,
    options: dict[str, Any],
    constructed: Callable[[Any], None],
) -> Any:
    """A trained trainer, with ``seen``: what it returned. ``constructed`` is called when it is made."""
    torch.manual_seed(0)
    processing = tokenizer(chat=trainer.data is chats)
    data = trainer.data()
    model: Any = feature.model(0)
    if trainer.samples:
        path = folder / "model"
        if not path.exists():
            model.save_pretrained(path)
        model = str(path)
    options_of_trainer: dict[str, Any] = {
        **({"eval_dataset": copy.deepcopy(data).select(range(8))} if feature.evaluates else {}),
        **({} if feature.peft and trainer.extra is _reference else trainer.extra(feature.model)),
        **({"peft_config": feature.peft()} if feature.peft else {}),
        **feature.extra,
    }
    made = cls(
        model=model,
        args=arguments(config, folder, **options),
        train_dataset=copy.deepcopy(data),
        processing_class=processing,
        **options_of_trainer,
    )
    constructed(made)
    made.train()
    if feature.evaluates:
        made.evaluate()  # which logs
    made.seen = {}
    if feature.outputs:
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
        made.model.eval()
        with torch.no_grad():
            loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
        made.seen |= {"returned_loss": float(loss)}
        numbers = _of_outputs(outputs)
        made.seen |= numbers if isinstance(numbers, dict) else {"logits": float(numbers.square().mean().sqrt())}
    return made


def run(trainer_name: str, feature_name: str) -> Result:
    """Train ours and TRL's and compare them."""
    trainer, feature = TRAINERS[trainer_name], FEATURES[feature_name]
    if trainer_name not in feature.only:
        return Result(trainer_name, feature_name, "–")
    start = time.perf_counter()
    options = {**trainer.options, **feature.options, **feature.of_trainer.get(trainer_name, {})}
    theirs_only = {name: value for name, value in options.items() if name not in ("least_memory", "logits_cache_bytes")}
    stock = on_logits(trainer.stock) if trainer_name in feature.on_logits else trainer.stock
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = _train(stock, trainer.config, trainer, feature, Path(folder), theirs_only, lambda made: None)
        except Exception as error:
            theirs = error
        config = getattr(ours, f"Liger{trainer.ours}Config")
        cls = getattr(ours, f"Liger{trainer.ours}Trainer")
        made: list[Any] = []
        try:
            sampled = 4 * options.get("gradient_accumulation_steps", 1) if trainer.samples else 0  # answers at a time
            rows = max(TILE_ROWS, sampled)
            with counted_tiles() as tiles, wide_tensors(VOCAB, rows=rows, hidden_size=HIDDEN) as found:
                mine = _train(cls, config, trainer, feature, Path(folder), options, made.append)
        except Exception as error:
            if isinstance(theirs, Exception) and not made:
                return Result(trainer_name, feature_name, "refused", _words(error))
            traceback.print_exc()
            return Result(trainer_name, feature_name, "different", f"ours raises {_words(error)}")
    seconds = time.perf_counter() - start
    if isinstance(theirs, Exception):
        return Result(trainer_name, feature_name, "TRL fails", _words(theirs), seconds=seconds)
    # The weight of an adapted head or of a teacher's, transposed, is no logits.
    widths = {(HIDDEN + more, VOCAB) for more in (0, 4, HIDDEN)} | {(48, VOCAB)}
    wide = [shape for _, shape in found if shape[-2:] not in widths]
    outcome, words = "same", deviation(mine, theirs)
    if words:
        outcome = "different"
    elif wide and not feature.logits:
        outcome, words = "different", f"logits {wide[0]} are made"
    elif wide:
        outcome = "same, logits"
    elif max(tiles, default=0) < 2:
        outcome, words = "different", f"no more than {max(tiles, default=0)} tiles and what is kept"
    return Result(trainer_name, feature_name, outcome, words, max(tiles, default=0), seconds)


def _words(error: Exception) -> str:
    first = re.sub(r"\s+", " ", str(error)).split(". ")[0]
    return f"{type(error).__name__}: {first}"[:160]


BEGIN, END = "<!-- made by python tests/trl/feature_matrix.py -->", "<!-- end -->"


def table(results: list[Result]) -> str:
    """Markdown between the markers of docs/trl.md."""
    cells = {(each.trainer, each.feature): each for each in results}
    notes: list[str] = []
    lines = [f"| with | {' | '.join(TRAINERS)} |", f"| --- |{' :---: |' * len(TRAINERS)}"]
    signs = {"same": "✓", "same, logits": "✓ ᴸ", "different": "✗", "–": "–"}
    for name, feature in FEATURES.items():
        row = []
        for trainer in TRAINERS:
            result = cells[trainer, name]
            sign = signs.get(result.outcome)
            if sign is None or result.outcome == "different":
                note = f"{result.outcome}: {result.words}"
                if note not in notes:
                    notes.append(note)
                mark = f"[{notes.index(note) + 1}]"
                sign = f"{sign} {mark}" if sign else mark
            row.append(sign)
        lines.append(f"| {feature.words} | {' | '.join(row)} |")
    numbers = f"torch {version('torch')}, transformers {version('transformers')}, TRL {version('trl')}"
    same = sum(each.outcome.startswith("same") for each in results)
    text = [
        BEGIN,
        "",
        f"{same} of {sum(each.outcome != '–' for each in results)} runs are the same, with {numbers}.",
        "",
        *lines,
        "",
        "✓: the same. ✓ ᴸ: the same, and logits are built, which the user's code reads. –: TRL has no such option.",
        "",
        *(f"{i + 1}. {note}" for i, note in enumerate(notes)),
        *([""] if notes else []),
        END,
    ]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--features", nargs="+", choices=list(FEATURES), default=list(FEATURES))
    parser.add_argument("--json", type=Path, help="append what is found, a cell a line; what it holds is not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[tuple[str, str], Result] = {}
    if options.json and options.json.exists():
        for line in options.json.read_text(encoding="utf-8").splitlines():
            result = Result(**json.loads(line))
            done[result.trainer, result.feature] = result
    results = []
    for feature in options.features:
        for trainer in options.trainers:
            result = done.get((trainer, feature)) or run(trainer, feature)
            results.append(result)
            if (trainer, feature) not in done:
                print(f"{trainer:13}{feature:17}{result.outcome:13}{result.seconds:5.1f} s  {result.words}", flush=True)
                if options.json:
                    with options.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(vars(result)) + "\n")
    if len(results) == len(TRAINERS) * len(FEATURES):
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + table(results) + rest.split(END)[1], encoding="utf-8")
    return int(any(each.outcome == "different" for each in results))


if __name__ == "__main__":
    sys.exit(main())
