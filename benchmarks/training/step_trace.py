"""What one step does, from torch's profiler: memory over its time, and which kind of work its time goes to."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.measure import synchronize

from .training_step import PHASES, TrainingStep

__all__ = ["KINDS", "LAUNCH_BLOCKING", "memory_over_time", "time_shares", "trace"]

Event = dict[str, Any]
POINTS = 400
LAUNCH_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1", "AMD_SERIALIZE_KERNEL": "3"}

# Kinds of work, in the order in which a bar stacks them. The first pattern that a kernel's name fits decides.
KINDS = ("matrix products", "attention", "fused kernels", "optimizer", "the rest", "idle")
PATTERNS = {
    "optimizer": r"adam|multi_tensor_apply",
    "attention": r"flash|fmha|attention|sdpa|\bmha",
    "matrix products": r"gemm|nvjet|xmma|cutlass|cublas|gemv|splitk|wgmma|aten::(mm|addmm|bmm|baddbmm)",
    # Names that Inductor gives to its kernels, and ours where a device has no kernels of its own in the trace.
    "fused kernels": r"^triton_|liger",
}


def trace(step: Callable[[], Any], device: torch.device, *, memory: bool = False) -> list[Event]:
    """The events of one run of the step, as the Chrome trace of torch's profiler has them.

    Args:
        step: what is run. It has run before.
        device: where it runs.
        memory: record each allocation.
    """
    activities = list(torch.profiler.supported_activities())
    if memory:
        activities = [torch.profiler.ProfilerActivity.CPU]
    synchronize(device)
    with (
        torch.profiler.profile(activities=activities, profile_memory=memory) as profiler,
        torch.profiler.record_function("step"),
    ):
        step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def span(events: Iterable[Event], name: str) -> tuple[float, float]:
    """Begin and end, in microseconds, of what `record_function` named so on the host."""
    found = next(each for each in events if each.get("cat") == "user_annotation" and each["name"] == name)
    return found["ts"], found["ts"] + found["dur"]


def memory_over_time(step: TrainingStep, device: torch.device) -> dict[str, Any]:
    """Bytes that are allocated at each moment of one step.

    The host allocates ahead of its device. Only a process in which each kernel's launch waits for its end
    (``CUDA_LAUNCH_BLOCKING=1``, see `LAUNCH_BLOCKING`) has a time axis that the device would agree with.

    Returns:
        ``mb``: 400 numbers, the most in each 400th of the step, in 1e6 bytes; ``ms``: the step's length in this
        process; ``phases``: ``{name: [begin, end]}`` in milliseconds; ``peak_bytes``.
    """
    before = step.persistent_bytes() if device.type == "cpu" else torch.accelerator.memory_allocated()
    events = trace(step, device, memory=True)
    begin, end = span(events, "step")
    on_cpu = device.type == "cpu"  # whose number among the device types is 0
    changes = sorted(
        (each["ts"], each["args"]["Bytes"])
        for each in events
        if each["name"] == "[memory]" and (each["args"]["Device Type"] == 0) == on_cpu
    )
    allocated = peak = before
    most = [0.0] * POINTS
    at = 0
    for ts, n_bytes in changes:
        now = min(POINTS - 1, max(0, int((ts - begin) / (end - begin) * POINTS)))
        for point in range(at, now + 1):  # what was there lasts until this change
            most[point] = max(most[point], allocated)
        at = now
        allocated += n_bytes
        most[at] = max(most[at], allocated)
        peak = max(peak, allocated)
    for point in range(at, POINTS):
        most[point] = max(most[point], allocated)
    phases = {name: [(t - begin) / 1e3 for t in span(events, name)] for name in PHASES}
    return {
        "ms": round((end - begin) / 1e3, 3),
        "phases": {name: [round(t, 3) for t in times] for name, times in phases.items()},
        "mb": [round(each / 1e6, 1) for each in most],
        "peak_bytes": int(peak),
    }


def triton_kernels() -> set[str]:
    """Names of the Triton kernels of the packages that are compared, as far as they are imported."""
    names = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("liger_trainer", "liger_kernel", "trl"):
            for each in vars(module).values():
                if type(each).__module__.startswith("triton."):
                    while hasattr(each, "fn"):  # autotuners and heuristics wrap the function
                        each = each.fn
                    names.add(getattr(each, "__name__", ""))
    return names - {""}


def kind_of(name: str, fused: set[str]) -> str:
    """The kind of work that a kernel does, from its name."""
    if name in fused:
        return "fused kernels"
    for kind, pattern in PATTERNS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "the rest"


def self_times(events: Sequence[Event]) -> list[tuple[str, float]]:
    """Names and microseconds of nested events, each without what runs inside of it."""
    found: list[tuple[str, float]] = []
    threads: dict[Any, list[Event]] = {}
    for each in events:
        threads.setdefault(each["tid"], []).append(each)
    for of_thread in threads.values():
        open_events: list[tuple[float, int]] = []  # end, index into found
        for each in sorted(of_thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and open_events[-1][0] <= each["ts"]:
                open_events.pop()
            if open_events:
                outer = open_events[-1][1]
                found[outer] = (found[outer][0], found[outer][1] - each["dur"])
            open_events.append((each["ts"] + each["dur"], len(found)))
            found.append((each["name"], each["dur"]))
    return found


def time_shares(events: Sequence[Event], fused: set[str] | None = None) -> dict[str, float]:
    """Milliseconds of a traced step by kind of work, those in which nothing ran as ``"idle"``.

    On an accelerator the kernels' times count; work that overlaps counts with each, and idle is what no kernel covers.
    On the CPU it is the time of each op without those that it calls.
    """
    fused = triton_kernels() if fused is None else fused
    begin, end = span(events, "step")
    on_device = [each for each in events if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device:
        times = [(each["name"], each["dur"]) for each in on_device]
        busy, until = 0.0, begin
        for each in sorted(on_device, key=lambda e: e["ts"]):
            start, stop = max(each["ts"], until), each["ts"] + each["dur"]
            if stop > start:
                busy, until = busy + stop - start, stop
    else:
        times = self_times([each for each in events if each.get("cat") == "cpu_op"])
        busy = sum(duration for _, duration in times)
    shares = dict.fromkeys(KINDS, 0.0)
    for name, duration in times:
        shares[kind_of(name, fused)] += duration / 1e3
    shares["idle"] = max(0.0, (end - begin - busy) / 1e3)
    return {kind: round(each, 3) for kind, each in shares.items()}
