"""Time and memory of a call, on any torch device.

Three times of the same call say different things: :func:`event_times` what a caller sees, :func:`device_time` what the
device needs without its host, :func:`host_time` what the host needs to enqueue it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = [
    "Band",
    "NotCapturableError",
    "cache_bytes",
    "copy_bandwidth",
    "current_device",
    "device_time",
    "event_times",
    "free_memory",
    "host_time",
    "memory_bytes",
    "peak_memory",
    "synchronize",
]

BUDGET_MS = 150.0
WARMUP_SHARE = 0.25  # of the budget, before it
FEWEST_CALLS = 5
MOST_CALLS = 500


class Band(NamedTuple):
    """Milliseconds that 20, 50 and 80 % of the calls stayed below."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Band:
        """The band of single times in milliseconds."""
        return cls(*torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


class NotCapturableError(Exception):
    """A call that can't be recorded in a device graph; the message says why.

    ``spoils``: the attempt has left this process's allocator and generators in the middle of a capture.
    """

    def __init__(self, reason: str, spoils: bool = False) -> None:
        super().__init__(reason)
        self.spoils = spoils


def current_device() -> torch.device:
    """The accelerator that torch found, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def free_memory(device: torch.device) -> None:
    """Give cached blocks back to the device, so that the next measurement starts from the same state."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache; 64 MiB where the device doesn't tell, 0 on the CPU."""
    if device.type == "cpu":
        return 0
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "L2_cache_size", 0) or 64 * 2**20


def memory_bytes(device: torch.device) -> int | None:
    """Bytes of the device's memory; None for the CPU. Asking makes the process one that uses the device."""
    return None if device.type == "cpu" else torch.get_device_module(device).mem_get_info(device)[1]


def _time_each(
    call: Callable[[], Any], device: torch.device, repeats: int, before: Callable[[], None] | None
) -> list[float]:
    """Milliseconds of each of ``repeats`` calls. On a device none of them waits for another's end on the host."""
    if device.type == "cpu":
        times = []
        for _ in range(repeats):
            if before is not None:
                before()
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
        return times
    stream = torch.accelerator.current_stream()
    marks = [[torch.Event(device=device.type, enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        if before is not None:
            before()
        start.record(stream)
        call()
        end.record(stream)
    torch.accelerator.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _repeats(one_call_ms: float, budget_ms: float, fewest: int) -> int:
    return min(MOST_CALLS, max(fewest, math.ceil(budget_ms / max(one_call_ms, 1e-3))))


def event_times(
    call: Callable[[], Any],
    device: torch.device,
    *,
    restore: Callable[[], None] | None = None,
    budget_ms: float = BUDGET_MS,
    flush: bool = True,
) -> Band:
    """Milliseconds between events around plain calls; on the CPU by the host's clock.

    Before each call, outside of the time, ``restore()`` runs and the device's cache is flushed, by writing a buffer of
    four times its size. The flush also lets the host run ahead, so that a call's time includes waits for the host only
    as far as the host is slower than the flush and the call together.

    Args:
        call: what is timed. It has run before: compilation is not part of any time.
        device: where it runs.
        restore: puts back what a call overwrites.
        budget_ms: about how long to measure, after a quarter of it to warm up; at least five calls are measured.
        flush: whether to flush the cache.
    """
    buffer = torch.empty(4 * cache_bytes(device) if flush else 0, dtype=torch.int8, device=device)

    def before() -> None:
        if restore is not None:
            restore()
        if buffer.numel():
            buffer.zero_()

    synchronize(device)
    estimate = min(_time_each(call, device, 2, before))
    _time_each(call, device, _repeats(estimate, WARMUP_SHARE * budget_ms, 1), before)
    return Band.of(_time_each(call, device, _repeats(estimate, budget_ms, FEWEST_CALLS), before))


def _refuse_host_sync(call: Callable[[], Any], device: torch.device) -> None:
    """Raise where the host waits for the device: capturing that fails, and can leave torch in a state of its own.

    Only CUDA and ROCm can tell.
    """
    if device.type != "cuda":
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" in str(error):
            raise NotCapturableError("the host waits for the device") from None
        raise
    finally:
        torch.cuda.set_sync_debug_mode("default")


def device_time(calls: Sequence[Callable[[], Any]], device: torch.device, *, budget_ms: float = BUDGET_MS) -> float:
    """Milliseconds of one call inside a replayed device graph, which no host can slow down.

    Args:
        calls: the same call on inputs of its own each. They are captured one after the other in one graph, so that,
            with inputs larger than the cache together, none finds its own in the cache.
        device: where they run.
        budget_ms: about how long to measure.

    Raises:
        NotCapturableError: the device has no graphs, or the call can't be captured.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    make_graph = getattr(module, "CUDAGraph", None) or getattr(module, "XPUGraph", None)
    if module is None or make_graph is None:
        raise NotCapturableError(f"no device graphs on {device.type}")
    synchronize(device)
    # One stream for warm-up and capture: autograd remembers the stream that a leaf was first used on.
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
        synchronize(device)
        _refuse_host_sync(calls[0], device)
    synchronize(device)
    gc.collect()  # not during the capture
    graph = make_graph()
    try:
        with module.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError as error:
        raise NotCapturableError(f"capture failed: {str(error).splitlines()[0]}", spoils=True) from None
    replays = event_times(graph.replay, device, budget_ms=budget_ms, flush=False)
    return replays.median / len(calls)


def host_time(call: Callable[[], Any], device: torch.device, *, chunks: int = 40, calls: int = 20) -> float:
    """Microseconds that the host takes to enqueue a call.

    Meant for inputs so small that the device keeps up. The host waits for the device between chunks, outside of the
    time, so that the launch queue doesn't fill; the median of the chunks counts.
    """
    times = []
    for _ in range(chunks + 1):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - started) / calls * 1e6)
    synchronize(device)
    return statistics.median(times[1:])


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call has allocated at its peak, its results included; None on the CPU, which doesn't count."""
    if device.type == "cpu":
        return None
    synchronize(device)
    gc.collect()
    time.sleep(0.02)  # autograd's thread may still hold what an earlier call's backward returned
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    result = call()
    synchronize(device)
    del result
    return torch.accelerator.max_memory_allocated() - before


def copy_bandwidth(device: torch.device, n_bytes: int = 2**30, *, budget_ms: float = BUDGET_MS) -> float:
    """GB (1e9 bytes) that a copy of ``n_bytes`` on the device reads and writes a second."""
    source = torch.empty(n_bytes, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    band = event_times(lambda: target.copy_(source), device, budget_ms=budget_ms, flush=False)
    return 2 * n_bytes / band.median / 1e6
