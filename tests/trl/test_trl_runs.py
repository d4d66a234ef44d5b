"""How a run may be: mixed precision, evaluation, packed batches, pairs without a label."""

from __future__ import annotations

import copy

import pytest
import torch
from beside_trl import TILE_ROWS, arguments, logged, pairs, run_beside, slow, tokenizer
from datasets import Dataset
from tiny_models import HIDDEN, VOCAB, sequences, tiny_llama
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from wide_tensors import wide_tensors

from liger_trainer import trl
from liger_trainer.trl import (
    LigerDPOConfig,
    LigerDPOTrainer,
    LigerORPOConfig,
    LigerORPOTrainer,
    LigerSFTConfig,
    LigerSFTTrainer,
)

pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
DPO = (LigerDPOTrainer, DPOTrainer), (LigerDPOConfig, DPOConfig)
ORPO = (LigerORPOTrainer, ORPOTrainer), (LigerORPOConfig, ORPOConfig)
SFT = (LigerSFTTrainer, SFTTrainer), (LigerSFTConfig, SFTConfig)


@pytest.mark.parametrize("kind", ["DPO", "ORPO"])
def test_mixed_precision(tmp_path, kind):
    """bf16 rounds the two differently; they stay near each other, and without logits."""
    runs = []
    for trainer, config in zip(*(DPO if kind == "DPO" else ORPO), strict=True):
        torch.manual_seed(0)
        options = {"ref_model": tiny_llama(1)} if kind == "DPO" else {}
        made = trainer(
            model=tiny_llama(),
            args=arguments(config, tmp_path, bf16=True, max_steps=3, learning_rate=3e-4),
            train_dataset=copy.deepcopy(pairs()),
            processing_class=tokenizer(),
            **options,
        )
        with wide_tensors(VOCAB, rows=2 * TILE_ROWS, hidden_size=HIDDEN) as found:  # of bf16, twice as many rows fit
            made.train()
        assert bool(found) == (trainer in (DPOTrainer, ORPOTrainer))
        runs.append([entry["loss"] for entry in logged(made) if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=2e-2)


@pytest.mark.parametrize("kind", ["DPO", pytest.param("ORPO", marks=slow), pytest.param("SFT", marks=slow)])
def test_evaluation(tmp_path, kind):
    trainers, configs = {"DPO": DPO, "ORPO": ORPO, "SFT": SFT}[kind]
    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    data = Dataset.from_list(rows) if kind == "SFT" else pairs()
    results = []
    for trainer, config in zip(trainers, configs, strict=True):
        torch.manual_seed(0)
        made = trainer(
            model=tiny_llama(),
            args=arguments(config, tmp_path, per_device_eval_batch_size=3),
            train_dataset=copy.deepcopy(data),
            eval_dataset=copy.deepcopy(data),
            processing_class=tokenizer(),
            **({"ref_model": tiny_llama(1)} if kind == "DPO" else {}),
        )
        if trainer is trainers[0]:
            with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as found:
                metrics = made.evaluate()
            assert not found
        else:
            metrics = made.evaluate()
        results.append({k: v for k, v in metrics.items() if "time" not in k and "per_second" not in k})
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        assert results[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@slow
def test_packed_batches(tmp_path):
    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    run_beside(*SFT, Dataset.from_list(rows), tmp_path, padding_free=True, max_length=None)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, pytest.param({"average_tokens_across_devices": False}, marks=slow)]
)
def test_label_smoothing_needs_no_logits(tmp_path, options):
    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    run_beside(*SFT, Dataset.from_list(rows), tmp_path, label_smoothing_factor=0.1, **options)


@slow
def test_a_loss_of_the_users_own_sees_logits(tmp_path):
    def half_the_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return 0.5 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    run_beside(
        *SFT,
        Dataset.from_list(rows),
        tmp_path,
        widest=None,
        trainer_options=lambda: {"compute_loss_func": half_the_loss},
    )


def test_a_difference_would_be_seen(tmp_path):
    """What the comparison is worth: another temperature of one head is another run."""
    from dataclasses import replace

    from liger_trainer.trl import mixin

    original = mixin._head_options
    mixin._head_options = lambda trainer, options: replace(original(trainer, options), temperature=1.001)
    try:
        with pytest.raises(AssertionError):
            run_beside(*DPO, pairs(), tmp_path, trainer_options=lambda: {"ref_model": tiny_llama(1)})
    finally:
        mixin._head_options = original


@pytest.mark.parametrize("name", [name for name in trl.__all__ if name.endswith("Config")])
def test_configs_parse_from_a_command_line(tmp_path, name):
    config = getattr(trl, name)
    command = [
        "--output_dir",
        str(tmp_path),
        "--use_liger",
        "true",
        "--logits_cache_bytes",
        "1000",
        "--use_cpu",
        "true",
    ]
    command += ["--liger_config", '{"tile_bytes": 500}', "--bf16", "false"]
    (parsed,) = TrlParser(config).parse_args_and_config(command)
    assert parsed.use_liger and parsed.logits_cache_bytes == 1000 and parsed.liger_config == {"tile_bytes": 500}
    if name == "LigerSimPOConfig":
        assert parsed.loss_type == "simpo" and parsed.cpo_alpha == 0
