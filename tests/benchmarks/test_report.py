"""The page and its plots, from a few rows."""

from __future__ import annotations

import pytest

import report
import rms_norm
from harness import plots
from harness.benchmark import Case
from harness.record import Record

DEVICE = "NVIDIA H100 80GB HBM3"


def row(provider, case, device_ms=None, error=None, host_us=None):
    found = {"provider": provider, "shape": case.sizes, "dtype": case.dtype, "error": error, "device_ms": device_ms}
    found |= {"event_ms": None, "device_note": None, "host_us": host_us, "peak_bytes": None, "floor_ms": 0.1}
    if error is None:
        time = device_ms or 0.3
        found |= {"event_ms": [time, 1.1 * time, 1.2 * time], "peak_bytes": 67_000_000}
        found["device_note"] = None if device_ms else "the host waits for the device"
    return found


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("matplotlib")
    record = Record("rms_norm", DEVICE, {"torch": "2.11.0"}, 2600.0, "2026-01-02")
    benchmark = rms_norm.BENCHMARK
    record.add(row("ours", benchmark.tiny, 0.004, host_us=151.2))
    for case in benchmark.sweeps[0].cases[:4]:
        record.add(row("hf", case, 0.5))
        record.add(row("ours", case, 0.12))
        record.add(row("torch", case))
        record.add(row("liger-cutedsl", case, error="cutlass | is not installed"))
    record.save(tmp_path / "results" / "rms_norm_h100.json")
    (tmp_path / "results" / "parity_h100.json").write_text("{}")  # somebody else's
    accuracy = Record("gradient_accuracy", DEVICE, {"torch": "2.11.0"}, None, "2026-01-02")
    for provider in ("one product", "exact, summed", "ours", "ours, fp32 grad", "cce"):
        for micro_batches in (1, 8):
            shape = {"rows": 8192, "hidden": 1024, "vocab": 128256, "micro_batches": micro_batches}
            errors = {"d_hidden": 0.0017, "d_weight": 0.002 * micro_batches, "error": None}
            if provider == "cce":
                errors = {"d_hidden": None, "d_weight": None, "error": "not installed"}
            accuracy.add({"provider": provider, "shape": shape, "dtype": "bfloat16", **errors})
    accuracy.save(tmp_path / "results" / "gradient_accuracy_h100.json")
    report.main(["--results", str(tmp_path / "results"), "--page", str(tmp_path / "docs" / "benchmarks.md")])
    return (tmp_path / "docs" / "benchmarks.md").read_text(), tmp_path / "results"


def test_memory_against_plain_logits():
    benchmark = next(each for each in report.BENCHMARKS if each.name == "dpo_loss")
    case = benchmark.bars[0]
    rows = [row(provider, case, 1.0) for provider in ("ours", "hf", "trl")]
    rows[0]["peak_bytes"] //= 5
    found = [report.cells(each, rows, {}, benchmark)[5] for each in rows]
    assert found == ["13 (−80 %)", "67", "67 (+0 %)"]
    rows[1] |= {"peak_bytes": None, "error": "out of memory"}
    assert report.cells(rows[0], rows, {}, benchmark)[5] == "13"
    assert [case.length * case.pairs for case in benchmark.bars] == [4096, 4096, 4096, 16384]


def test_tables(page):
    text, _ = page
    assert f"## {DEVICE}" in text and "2026-01-02: torch 2.11.0." in text
    assert "**rows 8,192, hidden 4,096, bfloat16**, floor 0.1 ms" in text
    assert "| **liger_trainer** | 0.12 | 0.132 (0.12–0.144) | 1.20 | 151 | 67 |  |" in text
    assert "no device time: the host waits for the device" in text
    assert "not run: cutlass \\| is not installed" in text
    assert "rows 16,384" not in text  # a bar shape that nobody measured


def test_at_a_glance_compares_like_with_like(page):
    text, _ = page
    # PyTorch has event times only: 0.33 over 0.132, not over 0.12
    assert "| RMSNorm: rows 8,192, hidden 4,096, bfloat16 | 1.20 | 3.30 | PyTorch fused | 2.50 |" in text


def test_accuracy(page):
    text, _ = page
    assert "| **liger_trainer**, fp32 grad | 1.70e-03 | 2.00e-03 | 1.60e-02 |  |  |" in text
    assert "*exact micro-gradients, summed in the gradient's dtype*" in text
    assert "| Cut Cross-Entropy |  |  |  |  | not run: not installed |" in text


def test_plots(page):
    text, results = page
    assert "![rms norm hidden h100](../results/rms_norm_hidden_h100.png)" in text
    assert (results / "rms_norm_hidden_h100.png").stat().st_size > 10_000
    assert not (results / "rms_norm_sequence_fp32_h100.png").exists()  # no rows


def test_every_provider_has_a_label_and_a_colour():
    for benchmark in report.BENCHMARKS:
        for provider in benchmark.providers:
            assert provider in plots.LABELS
            assert plots.line_style(provider)["color"]


def test_case_in_words():
    assert report.describe(Case(rows=8192, kv_heads=8, frozen=True)) == "rows 8,192, kv heads 8, frozen, bfloat16"
