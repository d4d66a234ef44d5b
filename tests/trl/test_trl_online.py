"""GRPO, RLOO and distillation: five steps of ours beside TRL's own, over the same sampled answers."""

from __future__ import annotations

import copy

import pytest
import torch
from beside_trl import pairs, run_beside, slow
from tiny_models import tiny_llama
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from liger_trainer.alignment_losses import GRPO_LOSS_TYPES
from liger_trainer.trl import (
    LigerDistillationConfig,
    LigerDistillationTrainer,
    LigerGRPOConfig,
    LigerGRPOTrainer,
    LigerRLOOConfig,
    LigerRLOOTrainer,
)

SAMPLING = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "temperature": 0.9,
    "learning_rate": 1e-3,
}


def evenness(completions, **_):
    """Rewards answers for their even words."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in each.split() if word[1:].isdigit())) for each in completions]


def saved(tmp_path):
    """A path: these trainers load their reference themselves."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def rewarded():
    return {"reward_funcs": evenness}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        pytest.param({"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}, marks=slow),
        pytest.param({"loss_type": "cispo", "epsilon_high": 2.0, "entropy_coef": 0.01}, marks=slow),
        pytest.param(
            {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "top_entropy_quantile": 0.5}, marks=slow
        ),
        pytest.param({"loss_type": "bnpo", "cast_lm_head_to_fp32": True}, marks=slow),
        *(pytest.param({"loss_type": each, "num_iterations": 2}, marks=slow) for each in GRPO_LOSS_TYPES),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_grpo(tmp_path, options):
    run_beside(
        (LigerGRPOTrainer, GRPOTrainer),
        (LigerGRPOConfig, GRPOConfig),
        pairs().select_columns(["prompt"]),
        tmp_path,
        model=lambda: saved(tmp_path),
        trainer_options=rewarded,
        **SAMPLING,
        **options,
    )


@slow
def test_rloo(tmp_path):
    run_beside(
        (LigerRLOOTrainer, RLOOTrainer),
        (LigerRLOOConfig, RLOOConfig),
        pairs().select_columns(["prompt"]),
        tmp_path,
        model=lambda: saved(tmp_path),
        trainer_options=rewarded,
        **SAMPLING,
    )


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=slow), 0.5, pytest.param(1.0, marks=slow)])
def test_distillation(tmp_path, beta):
    torch.manual_seed(1)
    teacher = tiny_llama(1, hidden_size=48, num_hidden_layers=1)
    run_beside(
        (LigerDistillationTrainer, DistillationTrainer),
        (LigerDistillationConfig, DistillationConfig),
        pairs().select_columns(["prompt"]),
        tmp_path,
        trainer_options=lambda: {"teacher_model": copy.deepcopy(teacher)},
        transposed_width=48,
        max_completion_length=6,
        temperature=0.9,
        learning_rate=1e-3,
        beta=beta,
    )
