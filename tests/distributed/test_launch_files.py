"""Every file in configs/accelerate, as ``accelerate launch`` reads it, and what Trainer makes of it without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.distributed.test_exactness import HAS_DEEPSPEED, needs_deepspeed

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def test_there_is_a_file_for_every_way_of_training() -> None:
    kinds = {"single", "ddp", "fsdp1", "fsdp2", "fsdp2_keep", "zero1", "zero2", "zero3"}
    assert {each.stem for each in FILES} == kinds


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("processes", [2, 8])
def test_accelerate_takes_it_for_every_recipe(file: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = int(file.stem[-1]) if file.stem.startswith("zero") else None
    if stage is not None and not HAS_DEEPSPEED:
        pytest.skip("needs deepspeed: make deepspeed")
    monkeypatch.setattr("torch.cuda.device_count", lambda: processes)  # else accelerate takes FSDP for DDP on the CPU
    monkeypatch.setattr("accelerate.commands.launch.is_cuda_available", lambda *a, **k: True, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for recipe in RECIPES:
        options = [] if file.stem == "single" else ["--num_processes", str(processes)]
        line = ["--config_file", str(file), *options, str(recipe), "--max_steps", "3"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
        assert args.training_script == str(recipe) and args.training_script_args == ["--max_steps", "3"]
        assert args.num_processes == (1 if file.stem == "single" else processes)
        assert bool(args.use_fsdp) == file.stem.startswith("fsdp")
        assert bool(args.use_deepspeed) == (stage is not None)
    if args.use_fsdp:
        environment = prepare_multi_gpu_env(args)
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == file.stem[4]
        reshard = {"fsdp1": "full_shard", "fsdp2": "true", "fsdp2_keep": "false"}[file.stem]
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == reshard
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    if stage is not None:
        # What the recipe is told decides: numbers here would contradict it.
        assert (args.zero_stage, args.gradient_accumulation_steps, args.gradient_clipping) == (stage, "auto", "auto")


LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@pytest.mark.parametrize(
    ("fsdp", "config", "version"),
    [
        (True, None, 2),
        pytest.param(True, {"reshard_after_forward": False}, 2, marks=pytest.mark.slow),
        ("full_shard auto_wrap", {f"fsdp_{name}": value for name, value in LAYERS.items()}, None),
        (True, {"version": 1, **LAYERS}, 1),
    ],
)
def test_training_arguments_without_a_file(
    fsdp: bool | str, config: dict | None, version: int | None, tmp_path: Path
) -> None:
    """In a process of its own: what these leave in the environment would reach other tests."""
    given = {"fsdp": fsdp, "fsdp_config": config}
    code = (
        "import json, sys; from liger_trainer import TrainingArguments;"
        "args = TrainingArguments('out', use_cpu=True, use_liger=True, **json.loads(sys.argv[1]));"
        "print(args.fsdp_plugin_args['fsdp_version'], args.liger_options())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    shown, options = ended.stdout.strip().splitlines()[-1].split(maxsplit=1)
    assert options == "{}"
    assert shown in ("1", "2") and (version is None or shown == str(version))


SCRIPT = """
import sys
from tiny_models import sequences, tiny_llama
from liger_trainer import LigerTrainer, TrainingArguments, is_patched

args = TrainingArguments(
    sys.argv[1], use_cpu=True, use_liger=True, max_steps=3, per_device_train_batch_size=2, max_grad_norm=0.5,
    gradient_accumulation_steps=2, save_strategy="no", logging_steps=1, learning_rate=1e-2, report_to=[],
    optim="adamw_torch", disable_tqdm=True,
)
trainer = LigerTrainer(tiny_llama(), args, train_dataset=sequences(24))
trainer.train()
assert is_patched(trainer.model)
if args.process_index == 0:
    losses = [round(each["loss"], 4) for each in trainer.state.log_history if "loss" in each]
    print("RESULT", type(trainer.model_wrapped).__name__, *losses, flush=True)
"""


@pytest.mark.slow
@needs_deepspeed
def test_the_files_that_a_cpu_can_launch_give_the_same_losses(tmp_path: Path) -> None:
    """On a CPU accelerate takes FSDP's files for DDP's; DeepSpeed runs there."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    results = {}
    for name in ("ddp", "zero1", "zero2", "zero3"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [
            str(ROOT / "configs" / "accelerate" / f"{name}.yaml"),
            "--num_processes",
            "2",
            str(script),
            str(tmp_path),
        ]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]
        results[name] = next(line for line in ended.stdout.splitlines() if line.startswith("RESULT")).split()[1:]
    assert [result[0] for result in results.values()] == ["DistributedDataParallel"] + ["DeepSpeedEngine"] * 3
    assert all(result[1:] == results["ddp"][1:] for result in results.values())
