"""SFT, DPO and KTO: five steps of ours beside TRL's own."""

from __future__ import annotations

import pytest
from beside_trl import pairs, run_beside, slow, unpaired
from datasets import Dataset
from tiny_models import sequences, tiny_llama
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from liger_trainer.alignment_losses import DPO_LOSS_TYPES
from liger_trainer.trl import (
    LigerDPOConfig,
    LigerDPOTrainer,
    LigerKTOConfig,
    LigerKTOTrainer,
    LigerSFTConfig,
    LigerSFTTrainer,
)

DPO = (LigerDPOTrainer, DPOTrainer), (LigerDPOConfig, DPOConfig)
KTO = (LigerKTOTrainer, KTOTrainer), (LigerKTOConfig, KTOConfig)
SFT = (LigerSFTTrainer, SFTTrainer), (LigerSFTConfig, SFTConfig)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_weighting": True},
        pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, marks=slow),
        pytest.param({"precompute_ref_log_probs": True}, marks=slow),
        pytest.param({"gradient_accumulation_steps": 2}, marks=slow),
        pytest.param({"ld_alpha": 0.5}, marks=slow),
        pytest.param({"f_divergence_type": "js_divergence"}, marks=slow),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 2}, marks=slow),
        *(pytest.param({"loss_type": each, "label_smoothing": 0.1}, marks=slow) for each in DPO_LOSS_TYPES),
    ],
    ids=lambda options: "-".join(map(str, [*options, options.get("loss_type", "")])),
)
def test_dpo(tmp_path, options):
    run_beside(*DPO, pairs(), tmp_path, trainer_options=lambda: {"ref_model": tiny_llama(1)}, **options)


@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=slow)])
def test_kto(tmp_path, loss_type):
    run_beside(*KTO, unpaired(), tmp_path, trainer_options=lambda: {"ref_model": tiny_llama(1)}, loss_type=loss_type)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"loss_type": "dft"}, marks=slow)], ids=lambda options: "-".join(options) or "plain"
)
def test_sft(tmp_path, options):
    rows = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in sequences(20)]
    run_beside(*SFT, Dataset.from_list(rows), tmp_path, **options)
