"""Command line of a benchmark: measure the chosen rows, write each to its JSON as soon as it is known, show a table."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .benchmark import Benchmark, Case, Inputs, Op, UnavailableError, as_tuple, gradients, make_step
from .measure import (
    BUDGET_MS,
    NotCapturableError,
    cache_bytes,
    copy_bandwidth,
    current_device,
    device_time,
    event_times,
    free_memory,
    host_time,
    peak_memory,
    synchronize,
)
from .record import Record, Row

__all__ = ["RESULTS", "Runner", "main", "relative_error", "show_table", "times_floor"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
MOST_INPUT_SETS = 16
REST_S = 0.5
# Relative error (Frobenius) beyond which a result is another function's. Rounding stays far below it.
WRONG = {"bfloat16": 0.03, "float16": 0.01, "float32": 0.01}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over that of the exact one (Frobenius)."""
    return float((found.double() - exact).norm() / exact.norm())


class Runner:
    """Measures rows of one benchmark on one device."""

    def __init__(self, benchmark: Benchmark, device: torch.device, budget_ms: float = BUDGET_MS) -> None:
        self.benchmark = benchmark
        self.device = device
        self.budget_ms = budget_ms
        self.bandwidth = copy_bandwidth(device, 2**30 if device.type != "cpu" else 2**25, budget_ms=budget_ms)
        self.healthy = True  # False once a provider has spoiled the process for the others
        self._floors: dict[Case, float] = {}
        self._checks: dict[tuple[str, str], float] = {}
        self._built: tuple[str, Case, Op] | None = None

    def build(self, name: str, case: Case) -> Op:
        """A provider's op; the one built last is kept, since checking and measuring may share a case."""
        if self._built is None or self._built[:2] != (name, case):
            self._built = (name, case, self.benchmark.providers[name].build(case))
            gc.collect()
            gc.freeze()  # what it imported stays: the many collections to come need not look at it
            atexit.register(gc.unfreeze)
        return self._built[2]

    def floor(self, case: Case) -> float:
        """Milliseconds below which no implementation is expected, measured in this process."""
        if case not in self._floors:
            if self.benchmark.floor_ms is not None:
                self._rest()
                self._floors[case] = self.benchmark.floor_ms(case, self.device, self.budget_ms)
                free_memory(self.device)
            else:
                assert self.benchmark.floor_bytes is not None
                self._floors[case] = self.benchmark.floor_bytes(case) / self.bandwidth / 1e6
        return self._floors[case]

    def check(self, name: str, dtype: str) -> float:
        """Largest relative error among a provider's outputs and gradients on the tiny case, against float64."""
        if (name, dtype) not in self._checks:
            case = Case(dtype, **self.benchmark.tiny.sizes)
            exact_inputs = self.benchmark.inputs(case, self.device).map(torch.Tensor.double)
            exact = self._results(self.benchmark.reference, exact_inputs)
            # Made again, not shared: some providers write to their arguments.
            found = self._results(self.build(name, case), self.benchmark.inputs(case, self.device))
            self._checks[name, dtype] = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
        return self._checks[name, dtype]

    def _results(self, op: Op, inputs: Inputs) -> list[torch.Tensor]:
        outputs = as_tuple(op(*inputs.args))
        values = [each.detach().clone() for each in outputs]
        return values + list(torch.autograd.grad(outputs, inputs.differentiable(), gradients(outputs, inputs)))

    def measure(self, case: Case, name: str) -> Row:
        """One row. What goes wrong is its ``error``, and nobody else's."""
        provider = self.benchmark.providers[name]
        row: Row = {
            "provider": name,
            "shape": case.sizes,
            "dtype": case.dtype,
            "event_ms": None,
            "device_ms": None,
            "device_note": None,
            "host_us": None,
            "peak_bytes": None,
            "floor_ms": None,
            "check": None,
            "error": None,
        }
        try:
            provider.check_requirements()
            for variable, value in provider.environment.items():
                if os.environ.get(variable) != value:
                    raise UnavailableError(f"needs {variable}={value} in the environment")
            row["floor_ms"] = self.floor(case)
            row["check"] = self.check(name, case.dtype)
            if not row["check"] < WRONG[case.dtype]:
                raise UnavailableError(f"wrong result on a small problem: relative error {row['check']:.2g}")
            op = self.build(name, case)
            self._measure_plain_calls(row, op, case, provider.overwrites)
            free_memory(self.device)
            if self.benchmark.device_graphs:
                self._measure_device(row, op, case)
        except UnavailableError as error:
            row["error"] = str(error)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["error"] = f"{type(error).__name__}: {lines[0][:200]}"
        if row["error"] and not device_works(self.device):
            self.healthy = False
        else:
            free_memory(self.device)
        return {name: rounded(value) for name, value in row.items()}

    def _measure_plain_calls(self, row: Row, op: Op, case: Case, overwrites: bool) -> None:
        inputs = self.benchmark.inputs(case, self.device)
        restore = None
        if overwrites:
            pristine = [each.detach().clone() for each in inputs.tensors()]

            def restore() -> None:
                for each, value in zip(inputs.tensors(), pristine, strict=True):
                    each.detach().copy_(value)

        step = make_step(op, inputs)
        for _ in range(2):  # compiles, tunes, allocates workspaces
            step()
        row["peak_bytes"] = peak_memory(step, self.device)
        self._rest()
        row["event_ms"] = event_times(step, self.device, restore=restore, budget_ms=self.budget_ms)
        if case == self.benchmark.tiny:
            row["host_us"] = host_time(step, self.device)

    def _rest(self) -> None:
        """Matrix products heat a device, and a hot one is slower: whoever's are timed, they begin after a pause."""
        if not self.benchmark.device_graphs and self.device.type != "cpu":
            synchronize(self.device)
            time.sleep(REST_S)

    def _measure_device(self, row: Row, op: Op, case: Case) -> None:
        n_bytes = sum(each.nbytes for each in self.benchmark.inputs(case, self.device).tensors())
        sets = min(MOST_INPUT_SETS, 1 + 4 * cache_bytes(self.device) // n_bytes)
        try:
            steps = [make_step(op, self.benchmark.inputs(case, self.device, seed)) for seed in range(sets)]
            row["device_ms"] = device_time(steps, self.device, budget_ms=self.budget_ms)
        except NotCapturableError as reason:
            row["device_note"] = str(reason)
            self.healthy = not reason.spoils
        except torch.OutOfMemoryError:
            row["device_note"] = "out of memory"


def rounded(value: Any) -> Any:
    """Floats to five significant digits, also in a band; what is stored needs no more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [rounded(each) for each in value] if isinstance(value, tuple) else value


def device_works(device: torch.device) -> bool:
    """False after an illegal access and its like, which spoil a process for good."""
    try:
        torch.zeros(8, device=device).sum().item()
        synchronize(device)
    except RuntimeError:
        return False
    return True


def times_floor(row: Row) -> float | None:
    """A row's device time, or its event time where it has no other, in multiples of its floor."""
    if row["event_ms"] is None:
        return None
    return (row["device_ms"] or row["event_ms"][1]) / row["floor_ms"]


def summary(row: Row) -> str:
    if row["error"]:
        return row["error"]
    parts = [f"events {row['event_ms'][1]:.4g} ms"]
    if row["device_ms"] is not None:
        parts.append(f"device {row['device_ms']:.4g} ms")
    if row["host_us"] is not None:
        parts.append(f"host {row['host_us']:.0f} µs")
    if row["peak_bytes"] is not None:
        parts.append(f"peak {row['peak_bytes'] / 1e6:,.0f} MB")
    parts.append(f"{times_floor(row):.2f} × floor")
    return ", ".join(parts)


def run(
    benchmark: Benchmark, jobs: list[int], options: argparse.Namespace, every: list[tuple[Case, str]]
) -> tuple[list[int], bool]:
    """Measure the jobs of these indices; returns those left for another process, and whether this one can go on."""
    device = options.device
    record, path = Record.open(options.results, benchmark.name, device)
    runner = Runner(benchmark, device, options.budget_ms)
    record.copy_bandwidth_gb_s = round(runner.bandwidth, 1)
    for done, i in enumerate(jobs):
        case, name = every[i]
        started = time.perf_counter()
        row = runner.measure(case, name)
        record.add(row)
        record.save(path)
        seconds = time.perf_counter() - started
        print(
            f"[{i + 1}/{len(every)}] {benchmark.name} ({case}) {name}: {summary(row)} [{seconds:.1f} s]",
            file=sys.stderr,
        )
        if not runner.healthy:
            return jobs[done + 1 :], False
    return [], True


def groups(
    benchmark: Benchmark, every: list[tuple[Case, str]], chosen: list[int]
) -> list[tuple[dict[str, str], list[int]]]:
    """Jobs by the environment that their providers need; one without its modules needs none to say so."""
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i in chosen:
        provider = benchmark.providers[every[i][1]]
        environment = dict(provider.environment)
        try:
            provider.check_requirements()
        except UnavailableError:
            environment = {}
        found.setdefault(tuple(sorted(environment.items())), []).append(i)
    return [(dict(environment), jobs) for environment, jobs in sorted(found.items())]


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; numbers are right-aligned, None is left blank."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(
            *("" if cell is None else f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def show(record: Record, every: list[tuple[Case, str]]) -> None:
    wanted = set(every)
    rows = []
    for row in record.rows:
        case = Case(row["dtype"], **row["shape"])
        if (case, row["provider"]) in wanted:
            memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6
            event = row["event_ms"][1] if row["event_ms"] else None
            cells = (row["device_ms"], event, times_floor(row), row["host_us"], memory)
            rows.append((str(case), row["provider"], *cells, row["error"] or row["device_note"]))
    columns = ("shape", "provider", "device ms", "event ms", "× floor", "host µs", "peak MB", "note")
    show_table(f"{record.benchmark} on {record.device}", columns, rows)


def main(*benchmarks: Benchmark, arguments: list[str] | None = None) -> None:
    """Run benchmarks from the command line."""
    by_name = {benchmark.name: benchmark for benchmark in benchmarks}
    providers = list(dict.fromkeys(name for benchmark in benchmarks for name in benchmark.providers))
    parser = argparse.ArgumentParser(description=f"Time and memory beside peers: {', '.join(by_name)}.")
    parser.add_argument("--providers", nargs="+", choices=providers, help="all by default")
    parser.add_argument("--shapes", choices=("tiny", "bars", "sweeps", "all"), default="all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--budget-ms", type=float, default=BUDGET_MS, help="about how long to measure one number")
    parser.add_argument("--device", type=torch.device, default=current_device(), help="torch's accelerator by default")
    # What a process that this one starts is to do: a benchmark's name and the indices of its jobs.
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    command = [sys.executable, sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    healthy = True
    for benchmark in [by_name[options.work[0]]] if options.work else benchmarks:
        every = benchmark.jobs(options.shapes, options.providers)
        chosen = [int(i) for i in options.work[1:]] if options.work else list(range(len(every)))
        for environment, jobs in groups(benchmark, every, chosen):
            left = jobs
            if healthy and all(os.environ.get(variable) == value for variable, value in environment.items()):
                left, healthy = run(benchmark, jobs, options, every)
            if left:
                work = ["--work", benchmark.name, *map(str, left)]
                subprocess.run([*command, *work], env=os.environ | environment, check=False)
        if not options.work:
            show(Record.open(options.results, benchmark.name, options.device)[0], every)
