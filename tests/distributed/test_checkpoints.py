"""What was saved goes on as if nothing had happened, on any number of processes; one that dies ends the job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from liger_trainer import is_patched
from tests.distributed.checkpoints import SAVED_AFTER, STEPS, sharded_steps, trainer_steps
from tests.distributed.group import Group, free_port
from tests.distributed.test_exactness import needs_deepspeed
from tests.distributed.training import batch, labels_in
from tests.distributed.wrappings import Wrapping

ROOT = Path(__file__).parents[2]


def stock_losses() -> tuple[list[float], torch.nn.Module]:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for step in range(STEPS):
        whole = batch(step)
        loss = model(**whole, num_items_in_batch=labels_in(whole)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, model


@pytest.mark.parametrize(
    "wrapping", [Wrapping("fsdp1"), Wrapping("fsdp2", "norm"), Wrapping("fsdp2", "alone")], ids=str
)
def test_a_sharded_checkpoint_goes_on(
    two_processes: Group, four_processes: Group, wrapping: Wrapping, tmp_path: Path
) -> None:
    expected, stock = stock_losses()
    assert two_processes.run(sharded_steps, wrapping, str(tmp_path), False)[0] == pytest.approx(expected, rel=1e-5)
    for group in (two_processes, four_processes):
        resumed = group.run(sharded_steps, wrapping, str(tmp_path), True)[0]
        assert resumed == pytest.approx(expected[SAVED_AFTER:], rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM" and not is_patched(plain)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


ZERO = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.mark.parametrize("config", [None, pytest.param(ZERO, marks=needs_deepspeed)], ids=["ddp", "zero3"])
def test_a_trainers_checkpoint_goes_on(two_processes: Group, config: dict | None, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    alone = trainer_steps(str(tmp_path / "alone"))
    expected = two_processes.run(trainer_steps, first, None, 0, config)[0]
    assert list(expected) == [1, 2, 3, 4]
    assert expected == pytest.approx(alone, rel=1e-4)
    resumed = two_processes.run(trainer_steps, str(tmp_path / "again"), f"{first}/checkpoint-2", 0, config)[0]
    assert resumed == pytest.approx(expected, rel=1e-5)  # the log goes on as well
    if config is None:
        elsewhere = trainer_steps(str(tmp_path / "elsewhere"), f"{first}/checkpoint-2")
        assert elsewhere == pytest.approx(expected, rel=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(Path(first) / "final")
    assert not is_patched(plain)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "alone" / "final")
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def test_a_process_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["-m", "tests.distributed.checkpoints", str(tmp_path), "3"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr or "-9" in ended.stderr
    assert time.monotonic() - started < 150
    assert not list(tmp_path.glob("finished-*"))
    checkpoint = get_last_checkpoint(str(tmp_path))
    assert checkpoint is not None and checkpoint.endswith("checkpoint-2")
    resumed = trainer_steps(str(tmp_path / "on"), checkpoint)
    assert resumed == pytest.approx(trainer_steps(str(tmp_path / "whole")), rel=1e-4)
