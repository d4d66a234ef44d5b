"""The harness measures what it says, as far as a CPU can show it."""

from __future__ import annotations

import time

import pytest
import torch

from harness.benchmark import Case, Inputs, make_step
from harness.measure import (
    NotCapturableError,
    cache_bytes,
    copy_bandwidth,
    device_time,
    event_times,
    host_time,
    peak_memory,
)

CPU = torch.device("cpu")


def test_event_times_are_milliseconds_with_restoring_left_out():
    calls = []

    def restore():
        calls.append("restore")
        time.sleep(0.02)

    def call():
        calls.append("call")
        time.sleep(0.005)

    band = event_times(call, CPU, restore=restore, budget_ms=1)
    assert 5 <= band.p20 <= band.median <= band.p80 < 15
    assert calls[::2] == ["restore"] * (len(calls) // 2)
    assert calls[1::2] == ["call"] * (len(calls) // 2)


def test_slow_calls_are_timed_five_times_and_warmed_up():
    calls = []
    event_times(lambda: calls.append(time.sleep(0.01)), CPU, budget_ms=1)
    assert len(calls) == 2 + 1 + 5


def test_host_time_is_microseconds():
    assert 2000 <= host_time(lambda: time.sleep(0.002), CPU, chunks=3, calls=2) < 8000


def test_copy_bandwidth_counts_what_is_read_and_written():
    n_bytes = 2**24
    source, target = torch.zeros(n_bytes, dtype=torch.int8), torch.zeros(n_bytes, dtype=torch.int8)
    target.copy_(source)
    best = min(event_times(lambda: target.copy_(source), CPU, budget_ms=20).p20 for _ in range(3))
    assert copy_bandwidth(CPU, n_bytes, budget_ms=20) < 2 * 2 * n_bytes / best / 1e6


def test_what_a_cpu_does_not_have_is_said():
    assert peak_memory(lambda: torch.zeros(1000), CPU) is None
    assert cache_bytes(CPU) == 0
    with pytest.raises(NotCapturableError, match="no device graphs on cpu"):
        device_time([lambda: None], CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_device_time_peak_memory_and_a_call_that_waits_on_a_gpu():
    device = torch.device("cuda")
    x = torch.randn(1024, 1024, device=device, requires_grad=True)
    step = make_step(lambda x: x.exp(), Inputs((x,), (torch.ones_like(x),)))
    step()
    assert 0 < device_time([step, step], device, budget_ms=5) < event_times(step, device, budget_ms=5).median
    assert 2 * x.nbytes <= peak_memory(step, device) < 4 * x.nbytes
    with pytest.raises(NotCapturableError, match="waits for the device"):
        device_time([lambda: x.sum().item()], device)
    assert torch.randn(8, device=device).isfinite().all()  # nothing is left behind


def test_step_hands_its_gradient_to_the_outputs_in_their_dtype():
    x = torch.ones(4, requires_grad=True)
    step = make_step(lambda x: (2 * x.bfloat16(), 3 * x), Inputs((x,), (torch.full((4,), 10.0), torch.ones(4))))
    (gradient,) = step()
    assert gradient.tolist() == [23.0] * 4
    assert x.grad is None
    assert make_step(lambda x: (5 * x).sum(), Inputs((x,)))()[0].tolist() == [5.0] * 4


def test_cases_compare_by_sizes_and_dtype():
    case = Case(rows=8, ignored=0.5)
    assert case == Case(ignored=0.5, rows=8) and hash(case) == hash(Case(ignored=0.5, rows=8))
    assert case != Case("float32", rows=8, ignored=0.5)
    assert (case.rows, case.torch_dtype, str(Case(rows=8, frozen=True))) == (
        8,
        torch.bfloat16,
        "rows 8, frozen, bfloat16",
    )
    with pytest.raises(AttributeError):
        _ = case.columns
