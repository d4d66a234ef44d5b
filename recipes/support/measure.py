"""What a run measures of itself: losses, tokens per second, peak memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass
class RunReport:
    """The figures of one training run.

    Attributes:
        title: what was run, for tables and legends.
        device: the device's name.
        processes: how many trained together.
        steps: optimizer steps of this run, at which `losses` were logged.
        losses: training loss at each of `steps`, in nats per labelled token.
        heldout_before, heldout_after: loss on the held-out chats, same unit.
        tokens_per_second: input tokens over all processes, without the first step, evaluation and saving.
        peak_bytes: the most memory any process held while training: what the allocator gave out on an accelerator,
            the resident set on a CPU.
    """

    title: str
    device: str
    processes: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    heldout_before: float = math.nan
    heldout_after: float = math.nan
    tokens_per_second: float = math.nan
    peak_bytes: int = 0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> RunReport:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Meter(TrainerCallback):
    """Times the steps, reads the peak memory, and stops the run early where it is told to.

    The peak counts from the first step on, so that loading and the evaluation before it don't.

    Args:
        stop_after_steps: end after this many optimizer steps of this run, the schedule unchanged.
        stop_after_seconds: end after the first step that ends so long after the first began.
    """

    def __init__(self, stop_after_steps: int | None = None, stop_after_seconds: float | None = None) -> None:
        self.stop_after_steps = math.inf if stop_after_steps is None else stop_after_steps
        self.stop_after_seconds = math.inf if stop_after_seconds is None else stop_after_seconds
        self.limited = stop_after_steps is not None or stop_after_seconds is not None
        self.steps = 0
        self.first_step = 1
        self.heldout_before = math.nan
        self.seconds = 0.0
        self.tokens_per_second = math.nan
        self.peak_bytes = 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if math.isnan(self.heldout_before):
            self.heldout_before = metrics["eval_loss"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps == 0:
            self.first_step = state.global_step + 1
            reset_peak_memory()
            self.started = _now()
        self.step_started = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == 1:  # It compiles and allocates: left out of the rate.
            self.tokens_before = state.num_input_tokens_seen
        else:
            self.seconds += _now() - self.step_started
            self.tokens_per_second = (state.num_input_tokens_seen - self.tokens_before) / self.seconds
        if self.limited:
            late = time.perf_counter() - self.started >= self.stop_after_seconds
            stop = torch.tensor(float(late or self.steps >= self.stop_after_steps), device=args.device)
            # All processes leave after the same step, or the others would wait for this one's gradients.
            control.should_training_stop |= bool(reduce(stop, "sum") > 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.peak_bytes = peak_memory()


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, or ``CPU, threads: 2``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)


def share_of_cores() -> int:
    """The cores that this process may use, divided by the processes of its launch on this machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _counts_device_memory() -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here, where the platform can."""
    if _counts_device_memory():
        torch.accelerator.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # The kernel then starts VmHWM again from the present size.


def peak_memory() -> int:
    """Peak memory of this process in bytes: the accelerator's allocator, or the resident set without one."""
    if _counts_device_memory():
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
