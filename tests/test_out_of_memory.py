"""A step that runs out of memory says what would help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import sequences, tiny_llama

from liger_trainer import LigerTrainer, TrainingArguments


def trainer(folder: Path, **settings: Any) -> LigerTrainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, use_liger=True, max_steps=1, save_strategy="no", report_to=[], **settings
    )
    return LigerTrainer(tiny_llama(), args, train_dataset=sequences(8), eval_dataset=sequences(8))


def out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("out of memory")


def notes(error: BaseException) -> str:
    return "\n".join(error.__notes__)


def test_training_names_what_is_not_in_force_yet(tmp_path: Path) -> None:
    failing = trainer(tmp_path, per_device_train_batch_size=4)
    failing.model.lm_head.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        failing.train()
    said = notes(caught.value)
    for each in (
        "gradient_checkpointing=True",
        "'recompute': 'cheap'",
        "batch_size below 4",
        "'tile_bytes': 134217728",
    ):
        assert each in said
    assert "mlp_chunk_tokens" not in said  # checkpointing comes first


def test_training_names_nothing_that_is_in_force(tmp_path: Path) -> None:
    failing = trainer(
        tmp_path, per_device_train_batch_size=1, gradient_checkpointing=True, liger_config={"tile_bytes": 4 << 20}
    )
    failing.model.lm_head.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        failing.train()
    said = notes(caught.value)
    assert "gradient_checkpointing" not in said and "recompute" not in said and "batch_size" not in said
    assert "'mlp_chunk_tokens': 8192" in said
    assert "'tile_bytes': 1048576" in said and "1 MiB of logits at a time in place of 4 MiB" in said


def test_evaluation_has_advice_of_its_own(tmp_path: Path) -> None:
    failing = trainer(tmp_path, per_device_eval_batch_size=2)
    failing.compute_metrics = lambda prediction: {}
    failing.model.lm_head.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        failing.evaluate()
    said = notes(caught.value)
    assert "preprocess_logits_for_metrics" in said and "per_device_eval_batch_size below 2" in said
    assert "gradient_checkpointing" not in said


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("something else")

    failing = trainer(tmp_path)
    failing.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else") as caught:
        failing.train()
    assert not getattr(caught.value, "__notes__", None)
