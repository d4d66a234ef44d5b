"""ORPO, CPO, SimPO and GKD: five steps of ours beside TRL's own, which builds the logits."""

from __future__ import annotations

import functools

import beside_trl
import pytest
from beside_trl import chats, pairs, run_beside, slow, tokenizer
from tiny_models import tiny_llama
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from liger_trainer.trl import (
    LigerCPOConfig,
    LigerCPOTrainer,
    LigerGKDConfig,
    LigerGKDTrainer,
    LigerORPOConfig,
    LigerORPOTrainer,
    LigerSimPOConfig,
    LigerSimPOTrainer,
)

pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
CPO = (LigerCPOTrainer, CPOTrainer), (LigerCPOConfig, CPOConfig)


def test_orpo(tmp_path):
    run_beside((LigerORPOTrainer, ORPOTrainer), (LigerORPOConfig, ORPOConfig), pairs(), tmp_path, max_length=16)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        pytest.param({"loss_type": "hinge", "cpo_alpha": 0.0}, marks=slow),
        pytest.param({"loss_type": "ipo"}, marks=slow),
        pytest.param({"loss_type": "alphapo", "alpha": 0.2, "label_smoothing": 0.1}, marks=slow),
    ],
    ids=lambda options: options["loss_type"],
)
def test_cpo(tmp_path, options):
    run_beside(*CPO, pairs(), tmp_path, max_length=16, **options)


def test_simpo(tmp_path):
    def stock_config(**options):
        return CPOConfig(loss_type="simpo", cpo_alpha=0.0, **options)

    stock_config.__dataclass_fields__ = CPOConfig.__dataclass_fields__
    run_beside((LigerSimPOTrainer, CPOTrainer), (LigerSimPOConfig, stock_config), pairs(), tmp_path, max_length=16)


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=slow), 0.3, pytest.param(1.0, marks=slow)])
def test_gkd(tmp_path, monkeypatch, beta):
    monkeypatch.setattr(beside_trl, "tokenizer", functools.partial(tokenizer, chat=True))
    run_beside(
        (LigerGKDTrainer, GKDTrainer),
        (LigerGKDConfig, GKDConfig),
        chats(),
        tmp_path,
        trainer_options=lambda: {"teacher_model": tiny_llama(1, hidden_size=48, num_hidden_layers=1)},
        transposed_width=48,
        lmbda=0.0,
        beta=beta,
        max_length=16,
    )
