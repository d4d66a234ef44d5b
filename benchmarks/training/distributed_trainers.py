"""The many-GPU benchmark through Trainer, LigerTrainer, TRL's DPOTrainer and LigerDPOTrainer."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import transformers

from harness.measure import synchronize
from harness.record import Row
from training.distributed_worker import LOSSES, Run, build_model, result
from training.sharded_shapes import SHAPES

__all__ = ["measure_trainer"]


class Clock(transformers.TrainerCallback):
    """Seconds of every step, from the second measured on with the peak of memory."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.warmup = 1 if run.probe else run.warmup
        self.device = device
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        if state.global_step == self.warmup and self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        if state.global_step > self.warmup:
            self.times.append(time.perf_counter() - self.started)


def strategy_arguments(run: Run) -> dict[str, Any]:
    if run.strategy.startswith("zero"):
        stage = int(run.strategy[-1])
        return {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": "auto"},
            }
        }
    if run.strategy == "ddp":
        return {"ddp_find_unused_parameters": False}
    version = int(run.strategy[-1])
    wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "version": version}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}


def common_arguments(run: Run, device: torch.device, folder: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": run.batch,
        "gradient_checkpointing": run.checkpointing,
        # Sums over 2,048 log-probabilities move fast: at 1e-5 the margins of DPO are 40 after a step, and any rounding
        # decides where the next one goes.
        "learning_rate": 1e-5 if run.task == "sft" else 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "bf16": device.type != "cpu",
        "use_cpu": device.type == "cpu",
        "optim": "adamw_torch_fused" if device.type != "cpu" else "adamw_torch",
        **strategy_arguments(run),
    }


def classes(run: Run) -> tuple[Any, Any]:
    """(trainer, arguments) of the run's task and provider."""
    if run.task == "dpo":
        if run.provider == "ours":
            from liger_trainer.trl import LigerDPOConfig, LigerDPOTrainer

            return LigerDPOTrainer, LigerDPOConfig
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    if run.provider == "ours":
        from liger_trainer import LigerTrainer, TrainingArguments

        return LigerTrainer, TrainingArguments
    return transformers.Trainer, transformers.TrainingArguments


def sft_trainer(run: Run, device: torch.device, model: Any, arguments: dict[str, Any], length: int) -> Any:
    count = arguments["max_steps"] * run.batch * dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 * length)
    ids = torch.randint(SHAPES[run.model].vocab_size, (count, length), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer, make_arguments = classes(run)
    if run.provider == "ours":
        arguments = arguments | {"use_liger": True}
    return trainer(model, make_arguments(**arguments), train_dataset=data)


def dpo_trainer(run: Run, device: torch.device, model: Any, arguments: dict[str, Any], length: int) -> Any:
    """Pairs of ``length`` tokens, a half of which is prompt; the reference is a second copy of the model."""
    from datasets import Dataset

    from training.trl_loss import tokenizer

    n_words = min(SHAPES[run.model].vocab_size, 1000)
    generator = torch.Generator().manual_seed(1000 * length)
    count = arguments["max_steps"] * run.batch * dist.get_world_size()

    def text(n_tokens: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, n_words, (n_tokens,), generator=generator).tolist())

    half = length // 2
    rows = [
        {"prompt": text(half), "chosen": " " + text(half - 1), "rejected": " " + text(half - 1)} for _ in range(count)
    ]
    arguments = arguments | {"max_length": length}
    options: dict[str, Any] = {"processing_class": tokenizer(n_words), "train_dataset": Dataset.from_list(rows)}
    options["ref_model"] = build_model(run, device, length)
    trainer, make_config = classes(run)
    return trainer(model, args=make_config(**arguments), **options)


def engaged(trainer: Any, run: Run) -> bool:
    """Whether the model that trains is wrapped as was asked; accelerate on a CPU runs FSDP as DDP."""
    kind = str(trainer.accelerator.distributed_type)
    wanted = {"ddp": "MULTI", "fsdp1": "FSDP", "fsdp2": "FSDP"}.get(run.strategy, "DEEPSPEED")
    return dist.get_world_size() == 1 or wanted in kind


def measure_trainer(run: Run, device: torch.device, write: Any) -> None:
    """Raises RuntimeError: the strategy did not engage."""
    steps = 2 if run.probe else max(run.warmup + run.steps, LOSSES)
    for length in run.lengths:
        with tempfile.TemporaryDirectory() as folder:
            arguments = common_arguments(run, device, folder, steps)
            make = dpo_trainer if run.task == "dpo" else sft_trainer
            trainer = make(run, device, build_model(run, device, length), arguments, length)
            if not engaged(trainer, run):
                raise RuntimeError(f"{run.strategy} did not engage: it is {trainer.accelerator.distributed_type}")
            clock = Clock(run, device)
            trainer.add_callback(clock)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        row: Row = result(run, length, device, clock.times, losses)
        write(length, row)
