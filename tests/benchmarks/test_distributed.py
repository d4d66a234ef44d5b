"""The many-GPU benchmark: on two CPU processes, and its bookkeeping with launches that are made up."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import report
from harness.record import Record
from training import distributed, distributed_report
from training.distributed import OUT_OF_MEMORY, PRESETS, Sweep, launch, tiny
from training.distributed_worker import LOSSES, Run

DEVICE = "NVIDIA H200"
RUN = Run("tiny", "hf", "sft", "fsdp2", 2, 2, (16, 32), False, False, warmup=1, steps=2, seconds=20.0)


def test_two_processes_and_the_same_losses_and_collectives():
    found = {}
    for provider in ("hf", "ours"):
        rows, error = launch(replace(RUN, provider=provider, lengths=(16,)), 240)
        assert error is None
        found[provider] = rows[16]
    hf, ours = found["hf"], found["ours"]
    assert len(hf["losses"]) == LOSSES
    assert ours["losses"] == pytest.approx(hf["losses"], rel=1e-5)
    assert ours["losses"] != hf["losses"]  # it was another implementation
    # A gather of each of the 2 layers in both directions and of the root once; a reduction of each of the three.
    assert ours["collectives"] == hf["collectives"] == {"all_gather": 5, "reduce_scatter": 3}
    assert hf["tokens_per_second_per_gpu"] == pytest.approx(2 * 16 / (hf["step_ms"] / 1e3))
    assert hf["device"] == "CPU" and hf["peak_bytes"] is None


def test_what_fails_says_why_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # by which the workers are known
    rows, error = launch(replace(RUN, strategy="nonsense"), 240)
    assert rows == {} and error.startswith("ValueError: strategy must be ddp, fsdp1")
    rows, error = launch(replace(RUN, steps=10**6, seconds=600.0), 25.0)  # in the middle of its steps
    assert rows == {} and error == "out of time"
    left = [each.info["cmdline"] for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in left if command and any(str(tmp_path) in part for part in command)]


@pytest.mark.slow
def test_through_the_trainer_a_strategy_that_does_not_engage_is_no_result():
    rows, error = launch(replace(RUN, trainer=True, lengths=(16,)), 240)  # accelerate trains FSDP on a CPU as DDP
    assert rows == {} and error.startswith("RuntimeError: fsdp2 did not engage")


# -- bookkeeping -------------------------------------------------------------------------------------------------------


def row_of(run, length, rate=100.0, peak=None):
    found = distributed.failed(run, length, None)
    found |= {"step_ms": 1.0, "tokens_per_second_per_gpu": rate, "peak_bytes": peak, "losses": [2.0] * LOSSES}
    return found | {"collectives": {"all_gather": 5}, "capacity_bytes": 1000, "device": DEVICE, "versions": {}}


class Made:
    """Launches in which sequences up to ``most`` tokens fit, of 1000 bytes in all."""

    def __init__(self, most, slow=()):
        self.most, self.slow, self.calls = most, slow, []

    def __call__(self, run, seconds):
        self.calls.append((run.provider, run.lengths))
        rows = {}
        for length in run.lengths:
            if length in self.slow:
                return rows, "out of time"
            if length > self.most:
                return rows, OUT_OF_MEMORY
            rows[length] = row_of(run, length, peak=100 + 900 * length // self.most)
        return rows, None


def sweep(folder: Path, start, seconds=1000.0, **options):
    return Sweep(folder, DEVICE, seconds, start=start, show=lambda text: None, **options)


def stored(folder: Path):
    return Record.load(folder / "distributed_sft_h200.json").rows


def test_out_of_memory_ends_a_launch_and_no_longer_context_is_tried(tmp_path):
    start = Made(most=32)
    run = replace(RUN, lengths=(16, 32, 64, 128))
    assert sweep(tmp_path, start).measure([run])
    assert [row["error"] for row in stored(tmp_path)] == [
        None, None, OUT_OF_MEMORY, "out of memory at 64 tokens already"
    ]  # fmt: skip
    assert sweep(tmp_path, start).measure([run])  # another call: all of it is on file
    assert len(start.calls) == 1


def test_a_later_call_goes_on_where_the_time_was_over(tmp_path):
    start = Made(most=1000, slow=(32,))
    runs = [RUN, replace(RUN, provider="ours")]
    assert not sweep(tmp_path, start).measure(runs)
    assert [row["shape"]["length"] for row in stored(tmp_path)] == [16, 16]
    start.slow = ()
    assert sweep(tmp_path, start).measure(runs)
    assert start.calls[2:] == [("hf", (32,)), ("ours", (32,))]
    assert not sweep(tmp_path, start, seconds=1.0).measure([replace(RUN, strategy="ddp")])
    assert len(start.calls) == 4


def test_the_search_goes_on_in_a_later_call_and_starts_from_what_was_measured(tmp_path):
    start = Made(most=50_000)
    run = replace(RUN, lengths=(1024, 4096, 65536))
    search = replace(RUN, lengths=(), probe=True)
    assert sweep(tmp_path, start).measure([run, search])
    tried = [lengths[0] for _, lengths in start.calls[1:]]
    assert all(4096 < length < 65536 for length in tried)  # what was measured is not tried again
    (row,) = (row for row in stored(tmp_path) if row["shape"]["length"] == 0)
    assert row["largest_length"] == 48 * 1024
    count = len(start.calls)
    assert sweep(tmp_path, start).measure([search])
    assert len(start.calls) == count
    # Cut off in the middle:
    other = replace(search, provider="ours")
    start.slow = (2048,)
    assert not sweep(tmp_path, start).measure([other])
    start.slow = ()
    assert sweep(tmp_path, start).measure([other])
    lengths = [length for provider, (length,) in start.calls[count:]]
    assert lengths.count(2048) == 2 and len(set(lengths)) == len(lengths) - 1


def test_presets():
    methods, scaling, headline = (list(PRESETS[name](8)) for name in ("methods", "scaling", "headline"))
    assert {run.strategy for run in methods} == set(distributed.STRATEGIES)
    assert {(run.task, run.trainer) for run in methods} == {("sft", False), ("sft", True), ("dpo", True)}
    assert sorted({run.gpus for run in scaling}) == [1, 2, 4, 8]
    measured = [run for run in headline if run.gpus == 8 and not run.probe]
    wanted = {(strategy, provider) for strategy in ("fsdp1", "fsdp2", "zero3") for provider in distributed.PROVIDERS}
    assert {(run.strategy, run.provider) for run in measured} == wanted
    assert {(run.strategy, run.provider) for run in headline if run.probe} == wanted
    assert {run.gpus for run in headline} == {4, 8}
    assert all(run.lengths == (1024, 2048, 4096, 8192, 16384) and run.checkpointing for run in measured)
    assert all(tiny(run).model == "tiny" for run in (*methods, *scaling, *headline))


def test_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    record = Record("distributed_sft", DEVICE, {"torch": "2.13.0"}, None, "2026-01-02")
    for provider, rate, peak in (("hf", 100.0, 8e9), ("ours", 150.0, 4e9)):
        for gpus, share in ((1, 1.0), (2, 0.95)):
            for length in (16, 32):
                run = replace(RUN, provider=provider, gpus=gpus, model="llama-3-8b", checkpointing=True)
                row = row_of(run, length, rate * share, peak)
                row["losses"] = [2.0 if provider == "hf" else 2.002] * LOSSES
                row["collectives"] = {"all_gather": 5 if provider == "hf" or gpus == 2 else 6}
                record.add(row)
    run = replace(RUN, model="llama-3-8b", checkpointing=True)
    record.add(distributed.failed(replace(run, provider="liger-kernel"), 16, "out of memory | at once"))
    for provider, most in (("hf", 16384), ("ours", 65536)):
        record.add(
            distributed.failed(replace(run, provider=provider), 0, None) | {"largest_length": most, "probes": {}}
        )
    results = tmp_path / "results"
    record.save(results / "distributed_sft_h200.json")
    report.main(["--results", str(results), "--page", str(tmp_path / "docs" / "benchmarks.md")])
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Training on several GPUs: NVIDIA H200, sft" in text
    assert "### llama-3-8b, SFT, 2 GPUs, batch 2 a GPU, layers recomputed" in text
    wanted = "| fsdp2 | 16 | liger_trainer | 142 | 4.0 | 1.50 ×, 50% | 1.0e-03 | 95.0% of 1 | 5 all-gather (as hf) |"
    assert wanted in text
    assert "6 all-gather (not as hf)" in text
    assert "not run: out of memory \\| at once" in text
    assert "| fsdp2 | liger_trainer | 65,536 | 4.0 × |" in text
    plots = list(results.glob("*.png"))
    assert len(plots) == 2 and all(f"../results/{plot.name}" in text for plot in plots)


def test_without_records_the_report_has_no_such_section(tmp_path):
    assert distributed_report.sections(tmp_path, tmp_path / "page.md", report.table) == []


def test_a_whole_dry_run_writes_a_record(tmp_path):
    arguments = ["--preset", "scaling", "--gpus", "1", "--providers", "ours", "--dry-run", "--results", str(tmp_path)]
    assert distributed.main(arguments) == 0
    (row,) = json.loads((tmp_path / "distributed_sft_cpu.json").read_text())["rows"]
    assert row["error"] is None and row["shape"]["gpus"] == 1 and "device" not in row
