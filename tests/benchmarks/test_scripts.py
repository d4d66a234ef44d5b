"""Every script runs, on whatever providers this machine has, and says of the others why not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradient_accuracy
import report
import rms_norm
from harness import run
from harness.benchmark import Benchmark, Case, Inputs, Provider, UnavailableError, randn
from harness.record import Record

BENCHMARKS = Path(run.__file__).parents[1]
# torch.compile takes seconds an op, and TRL's Triton kernel is slow in the interpreter.
FAST = [
    (benchmark, name)
    for benchmark in report.BENCHMARKS
    for name in benchmark.providers
    if name != "compile" and (benchmark.name, name) != ("cross_entropy", "trl")
]


@pytest.mark.parametrize(("benchmark", "provider"), FAST, ids=lambda each: getattr(each, "name", each))
def test_tiny_problem_of_every_provider(cpu, benchmark, provider):
    row = run.Runner(benchmark, cpu, budget_ms=0.1).measure(benchmark.tiny, provider)
    error = row["error"]
    if error and (provider.startswith(("liger", "cce")) or "not installed" in error or "has no F.linear" in error):
        return  # what is not there, or has no kernels for a CPU
    assert error is None
    assert row["check"] < 0.01
    assert row["event_ms"][1] > 0 and row["host_us"] > 0 and row["floor_ms"] > 0
    assert row["device_ms"] is None and row["peak_bytes"] is None


@pytest.mark.parametrize("benchmark", report.BENCHMARKS, ids=lambda each: each.name)
def test_declarations_fit_together(benchmark):
    jobs = benchmark.jobs("all")
    assert len(jobs) == len(set(jobs)) > len(benchmark.jobs("bars")) > len(benchmark.jobs("tiny"))
    assert set(benchmark.jobs("all", ["ours"])) == {job for job in jobs if job[1] == "ours"}
    for sweep in benchmark.sweeps:
        assert all(sweep.size in case.sizes for case in sweep.cases)
        assert set(sweep.providers) <= set(benchmark.providers)


def test_command_line_writes_rows_and_a_table(cpu, tmp_path, capsys):
    command = ["--shapes", "tiny", "--providers", "ours", "torch", "liger-cutedsl", "--budget-ms", "0.1"]
    run.main(rms_norm.BENCHMARK, arguments=[*command, "--results", str(tmp_path), "--device", "cpu"])
    record = Record.load(tmp_path / "rms_norm_cpu.json")
    assert [row["provider"] for row in record.rows] == ["ours", "torch", "liger-cutedsl"]
    assert record.copy_bandwidth_gb_s > 0
    output = capsys.readouterr()
    assert "rms_norm on CPU" in output.out and "torch" in output.out
    assert "[1/3] rms_norm (rows 4, hidden 64, bfloat16) ours: events" in output.err


def doubling(build, **options):
    def make_inputs(case, device, generator):
        return Inputs((randn(generator, case, case.rows),), (randn(generator, case, case.rows, grad=False),))

    return Benchmark(
        name="doubling",
        title="",
        about="",
        make_inputs=make_inputs,
        reference=lambda x: 2 * x,
        providers={"it": Provider(build, **options)},
        tiny=Case(rows=8),
        bars=[],
        floor_bytes=lambda case: 4 * case.rows,
    )


def measured(cpu, build, **options):
    benchmark = doubling(build, **options)
    return run.Runner(benchmark, cpu, budget_ms=0.1).measure(benchmark.tiny, "it")


def out_of_memory(case):
    raise torch.OutOfMemoryError("much text")


def unavailable(case):
    raise UnavailableError("no such thing")


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (lambda case: lambda x: 2.2 * x, {}, "wrong result on a small problem: relative error 0.1"),
        (lambda case: lambda x: x * torch.nan, {}, "wrong result on a small problem: relative error nan"),
        (out_of_memory, {}, "out of memory"),
        (unavailable, {}, "no such thing"),
        (lambda case: [][0], {}, "IndexError: list index out of range"),
        (None, {"requires": ("no_such_module",)}, "no_such_module is not installed"),
        (None, {"environment": {"NO_SUCH_VARIABLE": "1"}}, "needs NO_SUCH_VARIABLE=1 in the environment"),
    ],
)
def test_what_goes_wrong_is_in_the_row(cpu, build, options, reason):
    row = measured(cpu, build, **options)
    assert row["error"].startswith(reason)
    assert row["event_ms"] is None


def test_what_a_provider_overwrites_is_put_back(cpu):
    seen = []

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(float(x[0]))
            result = 2 * x
            x.data.fill_(7)
            return result

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    row = measured(cpu, lambda case: Overwriting.apply, overwrites=True)
    assert row["error"] is None
    timed = seen[4:-3]  # after the check, the making of a step and two calls; before the host time and another step
    assert set(timed) == {seen[0]} != {7.0}


SCRIPT = """
import os, sys
sys.path[:0] = [{benchmarks!r}, {here!r}]
from test_scripts import doubling
from harness.run import main

def build(case):
    assert os.environ["THE_VARIABLE"] == "set"
    return lambda x: 2 * x

main(doubling(build, environment={{"THE_VARIABLE": "set"}}))
"""


def test_a_provider_that_needs_an_environment_gets_a_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS), here=str(Path(__file__).parent)))
    command = [sys.executable, str(script), "--budget-ms", "0.1", "--results", str(tmp_path), "--device", "cpu"]
    result = subprocess.run([*command, "--shapes", "tiny"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = Record.load(tmp_path / "doubling_cpu.json").rows
    assert row["error"] is None and row["event_ms"][1] > 0


def test_gradient_accuracy(tmp_path, capsys):
    gradient_accuracy.main(["--tiny", "--results", str(tmp_path), "--device", "cpu"])
    rows = Record.load(tmp_path / "gradient_accuracy_cpu.json").rows
    error = {(row["provider"], row["shape"]["micro_batches"]): row["d_weight"] for row in rows}
    # bf16 has 8 bits; what is rounded once is off by less than what is rounded 32 times
    assert 1e-3 < error["one product", 1] < 2.5e-3
    assert error["exact, summed", 1] < error["exact, summed", 8] < error["exact, summed", 32] < 0.02
    assert error["hf, fp32 grad", 32] < error["exact, summed", 32] <= 1.01 * error["hf", 32]
    assert error["ours", 1] < 4e-3
    assert "exact, summed" in capsys.readouterr().out


def test_what_a_provider_spoils_goes_on_in_another_process(cpu, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(run, "device_works", lambda device: False)  # as after an illegal memory access
    monkeypatch.setattr(run.subprocess, "run", lambda command, **options: started.append(command))
    providers = {"bad": Provider(out_of_memory), "good": Provider(lambda case: lambda x: 2 * x)}
    benchmarks = [dataclasses.replace(doubling(None), name=name, providers=providers) for name in ("first", "second")]
    arguments = ["--shapes", "tiny", "--budget-ms", "0.1", "--results", str(tmp_path), "--device", "cpu"]
    run.main(*benchmarks, arguments=arguments)
    work = [command[command.index("--work") :] for command in started]
    assert work == [["--work", "first", "1"], ["--work", "second", "0", "1"]]
    assert [row["error"] for row in Record.load(tmp_path / "first_cpu.json").rows] == ["out of memory"]
