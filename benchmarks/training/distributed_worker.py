"""One rank of the many-GPU benchmark; started by distributed.py through torchrun, not by hand.

    torchrun --standalone --nproc-per-node 2 benchmarks/training/distributed_worker.py REQUEST FOLDER STARTER

REQUEST is a :class:`Run` as JSON. It imports, and waits for the file FOLDER/go with the lengths to measure, or until
the process STARTER, of which torchrun is a child, is gone. Each length's result goes to FOLDER as soon as it is there,
so that one that runs out of memory takes nothing but itself and what comes after it along.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.measure import current_device, free_memory, memory_bytes, synchronize
from harness.record import device_name, versions
from training.contexts import OUT_OF_MEMORY
from training.sharded_shapes import SHAPES

__all__ = ["GO", "LOSSES", "Run", "as_json", "import_for"]

GO = "go"  # the file that a group waits for
POLL_SECONDS = 0.05
LOSSES = 10  # of the first steps, which are compared between providers
COLLECTIVES = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}


@dataclass(frozen=True)
class Run:
    """What one group of processes measures, for each of ``lengths`` from the shortest on.

    Attributes:
        provider: ``"hf"``, ``"liger-kernel"`` or ``"ours"``.
        task: ``"sft"`` or ``"dpo"``; DPO needs ``trainer``.
        strategy: ``"ddp"``, ``"fsdp1"``, ``"fsdp2"``, ``"zero2"`` or ``"zero3"``.
        batch: sequences (pairs, for DPO) a process and step.
        trainer: through the Trainer of transformers or TRL (LigerTrainer, LigerDPOTrainer) instead of a plain loop.
        seconds: after which fewer steps do, two at the least.
        probe: run two steps only, to see whether they fit.
    """

    model: str
    provider: str
    task: str
    strategy: str
    gpus: int
    batch: int
    lengths: tuple[int, ...]
    checkpointing: bool
    trainer: bool
    warmup: int = 3
    steps: int = 10
    seconds: float = 120.0
    probe: bool = False

    def shape(self, length: int) -> dict[str, Any]:
        """What a row of the record is found by."""
        keys = ("model", "task", "strategy", "gpus", "batch", "checkpointing", "trainer")
        return {key: getattr(self, key) for key in keys} | {"length": length}


def build_model(run: Run, device: torch.device, longest: int) -> nn.Module:
    """The model, with the layers and the head that its provider trains; on each rank the same."""
    import transformers

    if run.provider == "liger-kernel":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # The loss of preferences is TRL's own: the layers alone serve there, as with its use_liger_kernel.
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=run.task == "sft")
    torch.manual_seed(0)
    config = SHAPES[run.model].config(max_position_embeddings=longest, use_cache=False)
    with device:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train()
    return model


def sharded(model: nn.Module, run: Run, device: torch.device) -> tuple[Any, Any]:
    """(what to call, optimizer) of a plain loop under the run's strategy."""
    layer_class = type(model.model.layers[0])
    if run.strategy.startswith("zero"):
        import deepspeed

        half = device.type != "cpu"
        config = {
            "train_micro_batch_size_per_gpu": run.batch,
            "zero_optimization": {"stage": int(run.strategy[-1])},
            "bf16": {"enabled": half},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        return engine, None
    if run.strategy == "ddp":
        ids = None if device.type == "cpu" else [device]
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    elif run.strategy == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({layer_class})
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=True)
    elif run.strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        raise ValueError(f"strategy must be ddp, fsdp1, fsdp2, zero2 or zero3, got {run.strategy!r}")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type != "cpu")


class Loop:
    """Steps of a plain training loop; data differs between ranks and is the same for every provider."""

    def __init__(self, run: Run, device: torch.device, length: int) -> None:
        self.run, self.device, self.length = run, device, length
        model = build_model(run, device, length)
        if run.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if run.provider == "ours":
            import liger_trainer

            line = liger_trainer.apply_liger_kernel(model).line()
            if dist.get_rank() == 0:
                print(line, file=sys.stderr)
        self.vocab_size = SHAPES[run.model].vocab_size
        self.model, self.optimizer = sharded(model, run, device)
        self.generator = torch.Generator(device).manual_seed(1000 * length + dist.get_rank())

    def __call__(self) -> Tensor:
        size = (self.run.batch, self.length)
        ids = torch.randint(self.vocab_size, size, device=self.device, generator=self.generator)
        loss = self.model(input_ids=ids, labels=ids).loss
        if self.optimizer is None:  # DeepSpeed's engine has its own
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def collectives_of(step: Any) -> dict[str, int]:
    """How many collectives of each kind one step starts, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    counts: Counter[str] = Counter()
    for event in profile.events():
        if event.name.startswith("c10d::"):
            for part, kind in COLLECTIVES.items():
                if part in event.name.replace("_base", "").replace("all_gather", "allgather"):
                    counts[kind] += 1
    return dict(counts)


def over_ranks(value: float, device: torch.device, how: Any) -> float:
    number = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(number, op=how)
    return float(number)


def timed(step: Any, run: Run, device: torch.device) -> tuple[list[float], list[Tensor]]:
    """Seconds of the measured steps and the losses of all; every rank takes the same number of steps."""
    warmup, steps = (1, 1) if run.probe else (run.warmup, max(run.steps, LOSSES - run.warmup))
    times: list[float] = []
    losses: list[Tensor] = []
    began = time.perf_counter()
    for count in range(warmup + steps):
        if count == warmup:
            synchronize(device)
            if device.type != "cpu":
                torch.accelerator.reset_peak_memory_stats()
        late = over_ranks(time.perf_counter() - began, device, dist.ReduceOp.MAX) > run.seconds
        if late and len(times) >= 2:
            break
        started = time.perf_counter()
        losses.append(step())
        synchronize(device)
        if count >= warmup:
            times.append(time.perf_counter() - started)
    return times, losses


def result(run: Run, length: int, device: torch.device, times: list[float], losses: list[float]) -> dict[str, Any]:
    peak = 0.0 if device.type == "cpu" else float(torch.accelerator.max_memory_allocated())
    seconds = over_ranks(statistics.median(times), device, dist.ReduceOp.MAX)
    sequences = run.batch * (2 if run.task == "dpo" else 1)
    return {
        "provider": run.provider,
        "dtype": "float32" if device.type == "cpu" else "bfloat16",
        "shape": run.shape(length),
        "error": None,
        "step_ms": seconds * 1e3,
        "step_ms_min_max": [min(times) * 1e3, max(times) * 1e3],
        "measured_steps": len(times),
        "tokens_per_second_per_gpu": sequences * length / seconds,
        "peak_bytes": over_ranks(peak, device, dist.ReduceOp.MAX) or None,
        "losses": losses[:LOSSES],
        "collectives": None,
        "capacity_bytes": memory_bytes(device),
        "device": device_name(device),
        "versions": versions(),
    }


def measure_loop(run: Run, device: torch.device, write: Any) -> None:
    for length in run.lengths:
        loop = Loop(run, device, length)  # from the start, so that a length's losses depend on no other one's
        times, losses = timed(loop, run, device)
        means = [over_ranks(float(loss), device, dist.ReduceOp.SUM) / dist.get_world_size() for loss in losses]
        row = result(run, length, device, times, means)
        if not run.probe:
            row["collectives"] = collectives_of(loop)
        write(length, row)
        del loop
        free_memory(device)


def import_for(run: Run) -> None:
    """Import whatever measuring the run will, and use no device."""
    names = ["transformers.models.llama.modeling_llama", "torch._dynamo"]  # the latter for optimizers
    if run.provider == "liger-kernel":
        names.append("liger_kernel.transformers")
    if run.provider == "ours":
        names += ["liger_trainer.patching", "liger_trainer.trainer"]
    if run.strategy.startswith("zero"):
        names.append("deepspeed")
    if run.trainer:
        names.append("training.distributed_trainers")
    if run.task == "dpo":
        names.append("training.trl_loss")
    for name in names:
        importlib.import_module(name)
    if run.trainer:
        from training.distributed_trainers import classes

        classes(run)


def wait_for_turn(folder: Path, starter: int) -> tuple[int, ...] | None:
    """The lengths to measure, or None where torchrun, or who has started it, is gone."""
    torchrun = psutil.Process(os.getppid())
    while not (folder / GO).exists():
        if os.getppid() != torchrun.pid or torchrun.ppid() != starter:
            return None
        time.sleep(POLL_SECONDS)
    return tuple(json.loads((folder / GO).read_text()))


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    folder, starter = Path(sys.argv[2]), int(sys.argv[3])
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])

    def write(length: int, row: dict[str, Any]) -> None:
        if rank == 0:
            path = folder / f"{length}.json"
            path.with_suffix(".tmp").write_text(json.dumps(row))
            path.with_suffix(".tmp").replace(path)

    try:
        import_for(run)
        lengths = wait_for_turn(folder, starter)
        if lengths is None:
            return
        run = replace(run, lengths=lengths)
        device = current_device()
        if device.type != "cpu":
            torch.accelerator.set_device_index(local_rank)
            device = torch.device(device.type, local_rank)
        dist.init_process_group(None if device.type == "cpu" else "nccl" if device.type == "cuda" else None)
        if run.trainer:
            from training.distributed_trainers import measure_trainer

            measure_trainer(run, device, write)
        else:
            measure_loop(run, device, write)
    except BaseException as error:
        traceback.print_exc()
        known = isinstance(error, torch.OutOfMemoryError)
        text = OUT_OF_MEMORY if known else f"{type(error).__name__}: {error}".splitlines()[0][:300]
        (folder / f"error{rank}.txt").write_text(text)
        os._exit(1)  # the other ranks may wait for this one; torchrun ends them
    dist.destroy_process_group()


def as_json(run: Run) -> str:
    return json.dumps(asdict(run))


if __name__ == "__main__":
    main()
