"""The script of the long form: runs that are kept, continued, judged and drawn."""

from __future__ import annotations

import pytest

from harness.record import Record
from training import convergence
from training.tasks import Training

STEPS, WINDOW = 8, 4


@pytest.fixture
def results(train, tmp_path):
    """A folder with two runs of the stock trainer and one of ours."""
    record, path = Record.open(tmp_path, convergence.BENCHMARK, "CPU")
    for provider, seed in (("hf", 1), ("hf", 0), ("ours", 0)):  # as they have ended, not by seed
        row = convergence.new_row(Training("sft", provider, seed, steps=STEPS))
        record.add(row | {"curves": train("sft", provider, seed=seed, steps=STEPS)})
    record.save(path)
    return tmp_path


def test_verdicts_and_plots(results, capsys):
    pytest.importorskip("matplotlib")
    command = ["--plots", "--window", str(WINDOW), "--results", str(results)]
    assert convergence.main(command) == 0
    printed = capsys.readouterr().out
    assert "passes" in printed and "training_convergence_sft_cpu.png" in printed
    assert (results / "training_convergence_sft_cpu.png").stat().st_size > 10_000
    path = results / "training_convergence_cpu.json"
    record = Record.load(path)
    record.rows[2]["curves"]["loss"] = [each + 1 for each in record.rows[2]["curves"]["loss"]]
    record.save(path)
    assert convergence.main(command) == 1  # a run of ours that fails
    assert "fails, most at step" in capsys.readouterr().out


def test_a_run_is_kept_and_not_run_again(tiny_model, tmp_path, capsys):
    command = ["--tasks", "sft", "--providers", "ours", "--steps", "2", "--batch", "2", "--length", "32", "--fp32"]
    command += ["--model", tiny_model, "--results", str(tmp_path)]
    assert convergence.main([*command, "--minutes", "0.1"]) == 3
    assert "goes on from here" in capsys.readouterr().err
    assert convergence.main(command) == 0
    assert "[1/1] sft ours, seed 0: loss" in capsys.readouterr().err
    (row,) = Record.load(tmp_path / "training_convergence_cpu.json").rows
    assert row["error"] is None and len(row["curves"]["loss"]) == 2 and row["dtype"] == "float32"
    assert convergence.main([*command, "--minutes", "0.1"]) == 0  # nothing is left to do
    assert "[1/1]" not in capsys.readouterr().err


def test_runs_at_the_same_time(tiny_model, tmp_path):
    command = ["--tasks", "sft", "--providers", "hf", "--steps", "2", "--batch", "2", "--length", "32", "--fp32"]
    command += ["--model", tiny_model, "--results", str(tmp_path), "--window", "1", "--jobs", "2"]
    assert convergence.main([*command, "--minutes", "0.1"]) == 3
    assert convergence.main([*command, "--seeds", "0", "1"]) == 0
    rows = Record.load(tmp_path / "training_convergence_cpu.json").rows
    assert sorted(each["shape"]["seed"] for each in rows) == [0, 1]
    assert all(each["error"] is None and len(each["curves"]["loss"]) == 2 for each in rows)
    assert rows[0]["curves"] != rows[1]["curves"]
