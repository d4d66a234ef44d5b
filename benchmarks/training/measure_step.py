"""Measurements of a training step, made in the process of `training.isolated.Isolated`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.measure import Band, current_device, free_memory, memory_bytes, synchronize
from harness.record import device_name

from .isolated import Isolated
from .providers import Provider
from .runs import Run
from .step_trace import memory_over_time, time_shares, trace
from .training_step import TrainingStep, build, import_for

__all__ = ["device_without_touching_it", "measurer"]

FEWEST_WARMUP, FEWEST_STEPS = 1, 1  # when the time is up; a first step makes the optimizer's state


def describe_device() -> Callable[[None], str]:
    return lambda _: device_name(current_device())


def device_without_touching_it(seconds: float) -> str:
    """The device's name, asked for in a process of its own: asking takes half a gigabyte of the device."""
    if not torch.accelerator.is_available():
        return device_name(torch.device("cpu"))
    with Isolated(describe_device) as process:
        return process.ask(None, seconds)


def memory_of(device: torch.device, limit_bytes: int | None) -> int | None:
    """Bytes of the device; of a limit, where there is one, which holds from here on. None for a CPU without one."""
    if limit_bytes is not None:
        limit_memory(limit_bytes, device)
        return limit_bytes
    return memory_bytes(device)


def limit_memory(n_bytes: int, device: torch.device) -> None:
    """Let this process allocate no more than so many bytes on its device, or, on a CPU, beyond what it has."""
    if device.type == "cpu":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, resource.RLIM_INFINITY))
    else:
        module = torch.get_device_module(device)
        module.set_per_process_memory_fraction(n_bytes / module.mem_get_info()[1])


def timed(
    step: TrainingStep, device: torch.device, warmup: int, steps: int, seconds: float
) -> tuple[list[float], list[torch.Tensor]]:
    """Milliseconds of each measured step, and all losses. Once ``seconds`` are over, one of each kind suffices."""
    times: list[float] = []
    losses: list[torch.Tensor] = []
    began = time.perf_counter()
    while len(times) < steps:
        late = time.perf_counter() - began > seconds
        if late and len(times) >= FEWEST_STEPS:
            break
        measured = len(losses) >= (FEWEST_WARMUP if late else warmup) or bool(times)
        if measured and not times and device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        started = time.perf_counter()
        losses.append(step())
        synchronize(device)
        if measured:
            times.append((time.perf_counter() - started) * 1e3)
    return times, losses


def measurer(run: Run, provider: str, limit_bytes: int | None = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Measures the run under a provider, for each request anew.

    A request has ``length`` (tokens of a sequence), ``warmup`` and ``steps``, ``seconds`` after which fewer steps do,
    and ``what``: ``"time"`` gives times, the peak of memory, losses and, from further steps, the shares of kinds of
    work; ``"memory"`` gives memory over a step's time. The device is first touched by a request.
    """
    device = current_device()
    who = Provider.parse(provider)
    import_for(run, who)
    capacity_bytes: int | None = None

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal capacity_bytes
        if capacity_bytes is None:
            capacity_bytes = memory_of(device, limit_bytes)
        free_memory(device)
        step = build(run, who, device, request["length"])
        if request["what"] == "memory":
            for _ in range(2):  # the second one finds the optimizer's state, and every kernel compiled
                step()
            return memory_over_time(step, device)
        times, losses = timed(step, device, request["warmup"], request["steps"], request["seconds"])
        band = Band.of(times)
        tokens = run.tokens // run.length * request["length"]
        row = {
            "step_ms": tuple(band),
            "steps": len(times),
            "tokens_per_second": tokens / band.median * 1e3,
            # The CPU's allocator keeps no count; the profiler sees every allocation of a step.
            "peak_bytes": memory_over_time(step, device)["peak_bytes"]
            if device.type == "cpu"
            else torch.accelerator.max_memory_allocated(),
            "capacity_bytes": capacity_bytes,
            "first_loss": float(losses[0]),
            "last_loss": float(losses[-1]),
            "patched": step.patched,
        }
        if request["shares"]:
            trace(step, device)  # sets the profiler up, which would count as idle
            row["shares_ms"] = time_shares(trace(step, device))
        return row

    return measure
