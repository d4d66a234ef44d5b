"""The many-GPU benchmark: on two CPU processes, and its bookkeeping with launches that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import report
from harness.record import Record
from training import distributed, distributed_report, distributed_worker
from training.contexts import OUT_OF_MEMORY
from training.distributed import PRESETS, Sweep, tiny
from training.distributed_group import OUT_OF_TIME, WORKER, Group
from training.distributed_worker import LOSSES, Run

DEVICE = "NVIDIA H200"
RUN = Run("tiny", "hf", "sft", "fsdp2", 2, 2, (16, 32), False, False, warmup=1, steps=2, seconds=20.0)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Torchruns and workers with a folder of their own in ``folder``."""
    found = []
    for each in psutil.process_iter(["cmdline", "status"]):
        mine = any(part.startswith(str(folder)) for part in each.info["cmdline"] or ())
        if mine and each.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(each)
    return found


def workers(folder: Path, count: int) -> list[psutil.Process]:
    """Those that torchrun has started, as soon as there are ``count``."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = [each for each in processes_of(folder) if "torch.distributed.run" not in each.info["cmdline"]]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{len(found)} processes where {count} were to start")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where groups have their folders, by which their processes are known."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    for each in processes_of(tmp_path):  # of a test that has failed
        each.kill()


def test_two_processes_and_the_same_losses_and_collectives(folders):
    found = {}
    with ExitStack() as stack:
        groups = {}
        for provider in ("hf", "ours"):  # side by side
            groups[provider] = stack.enter_context(closing(Group(replace(RUN, provider=provider))))
        for provider in ("ours", "hf"):
            assert not list(Path(groups[provider]._folder.name).glob("*.json"))
            rows, error = groups[provider].measure((16,), 240)
            assert error is None and list(rows) == [16]
            found[provider] = rows[16]
            assert len(processes_of(folders)) == (3 if provider == "ours" else 0)  # the other's wait, or none is left
    assert not list(folders.iterdir())
    hf, ours = found["hf"], found["ours"]
    assert len(hf["losses"]) == LOSSES
    assert ours["losses"] == pytest.approx(hf["losses"], rel=1e-5)
    assert ours["losses"] != hf["losses"]  # it was another implementation
    # A gather of each of the 2 layers in both directions and of the root once; a reduction of each of the three.
    assert ours["collectives"] == hf["collectives"] == {"all_gather": 5, "reduce_scatter": 3}
    assert hf["tokens_per_second_per_gpu"] == pytest.approx(2 * 16 / (hf["step_ms"] / 1e3))
    assert hf["device"] == "CPU" and hf["peak_bytes"] is None


def test_what_fails_says_why_and_leaves_no_process(folders):
    with closing(Group(replace(RUN, strategy="nonsense"))) as group:
        rows, error = group.measure((16,), 240)
    assert rows == {} and error.startswith("ValueError: strategy must be ddp, fsdp1")
    with closing(Group(replace(RUN, steps=10**6, seconds=600.0))) as group:
        rows, error = group.measure((16,), 15.0)  # in the middle of its steps
    assert rows == {} and error == OUT_OF_TIME
    assert not processes_of(folders)


def test_who_never_gets_a_turn_is_ended(folders):
    Group(RUN).close()  # torchrun has only just begun
    assert not processes_of(folders)
    group = Group(RUN)
    workers(folders, 2)
    group.close()
    assert not processes_of(folders)


def test_who_waits_ends_with_the_process_that_has_started_it(folders):
    code = f"""
import sys, tempfile, time
sys.path.insert(0, {str(WORKER.parents[1])!r})
from training.distributed_group import Group
from training.distributed_worker import Run
tempfile.tempdir = {str(folders)!r}
group = Group(Run(**{vars(RUN)!r}))
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        waiting = workers(folders, 2)
    finally:
        starter.kill()
        starter.wait()
    assert not psutil.wait_procs(waiting, timeout=60)[1]


def test_a_worker_waits_for_its_file_and_for_those_above_it(tmp_path, monkeypatch):
    above = psutil.Process(distributed_worker.os.getppid())  # in torchrun's place
    monkeypatch.setattr(distributed_worker, "POLL_SECONDS", 0.01)
    calls = []
    monkeypatch.setattr(
        distributed_worker.time, "sleep", lambda _: calls.append(1) or (tmp_path / "go").write_text("[8]")
    )
    assert distributed_worker.wait_for_turn(tmp_path, above.ppid()) == (8,) and len(calls) == 1
    (tmp_path / "go").unlink()
    assert distributed_worker.wait_for_turn(tmp_path, above.ppid() + 1) is None and len(calls) == 1


@pytest.mark.slow
def test_through_the_trainer_a_strategy_that_does_not_engage_is_no_result():
    with closing(Group(replace(RUN, trainer=True))) as group:
        rows, error = group.measure((16,), 240)  # accelerate trains FSDP on a CPU as DDP
    assert rows == {} and error.startswith("RuntimeError: fsdp2 did not engage")


# -- bookkeeping -------------------------------------------------------------------------------------------------------


def row_of(run, length, rate=100.0, peak=None):
    found = distributed.failed(run, length, None)
    found |= {"step_ms": 1.0, "tokens_per_second_per_gpu": rate, "peak_bytes": peak, "losses": [2.0] * LOSSES}
    return found | {"collectives": {"all_gather": 5}, "capacity_bytes": 1000, "device": DEVICE, "versions": {}}


class Made:
    """Groups in which sequences up to ``most`` tokens fit, of 1000 bytes in all."""

    def __init__(self, most, slow=()):
        self.most, self.slow, self.calls = most, slow, []
        self.happened = []

    def __call__(self, run):
        self.happened.append(("start", run.provider))
        return MadeGroup(self, run)


class MadeGroup:
    def __init__(self, made, run):
        self.made, self.run = made, run

    def measure(self, lengths, seconds):
        made = self.made
        made.happened.append(("measure", self.run.provider))
        made.calls.append((self.run.provider, lengths))
        rows = {}
        for length in lengths:
            if length in made.slow:
                return rows, OUT_OF_TIME
            if length > made.most:
                return rows, OUT_OF_MEMORY
            rows[length] = row_of(self.run, length, peak=100 + 900 * length // made.most)
        return rows, None

    def close(self):
        self.made.happened.append(("close", self.run.provider))


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


def test_the_next_group_starts_while_one_measures(tmp_path):
    start = Made(most=1000)
    a, b, c = (replace(RUN, provider=provider) for provider in distributed.PROVIDERS)
    assert sweep(tmp_path, start).measure([b])
    start.happened.clear()
    assert sweep(tmp_path, start).measure([a, b, c])  # b is on file
    assert start.happened == [
        ("start", "hf"), ("start", "ours"), ("measure", "hf"),
        ("close", "hf"), ("measure", "ours"), ("close", "ours"),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_closes_the_group_that_measures_and_the_one_that_waits(tmp_path, monkeypatch, error):
    start = Made(most=1000)

    def fail(self, lengths, seconds):
        raise error

    monkeypatch.setattr(MadeGroup, "measure", fail)
    with pytest.raises(error):
        sweep(tmp_path, start).measure([replace(RUN, provider=provider) for provider in distributed.PROVIDERS])
    assert sorted(start.happened) == [(what, who) for what in ("close", "start") for who in ("hf", "liger-kernel")]


def test_when_the_time_is_over_the_group_that_waits_is_closed(tmp_path):
    start = Made(most=1000)
    short = sweep(tmp_path, start, seconds=distributed.LEAST_SECONDS + 1.0)
    short.show = lambda text: setattr(short, "until", 0.0)  # the first run takes all of it
    assert not short.measure([replace(RUN, provider=provider) for provider in distributed.PROVIDERS])
    assert [who for what, who in start.happened if what == "measure"] == ["hf"]
    assert sorted(start.happened)[:2] == [("close", "hf"), ("close", "liger-kernel")] and len(start.happened) == 5


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
    assert len(methods) == len(set(methods)) == 5 * (3 + 2 + 3)
    first = [(run.strategy, run.task, run.provider) for run in methods[:5]]
    assert first == [("fsdp2", "sft", each) for each in distributed.PROVIDERS] + [
        ("fsdp2", "dpo", each) for each in ("hf", "ours")
    ]
    assert [run.trainer for run in methods] == [True] * 25 + [False] * 15  # what the documentation's table needs most
    order = ["fsdp2", "ddp", "zero3", "fsdp1", "zero2"]
    assert list(dict.fromkeys(run.strategy for run in methods)) == order
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
