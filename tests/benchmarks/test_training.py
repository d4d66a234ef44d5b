"""The training benchmarks: shapes, providers, the search for the largest context, traces, and a dry run of it all."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from misbehaving import answering

import report
from harness.record import Record
from training import headline, plots
from training.contexts import OUT_OF_MEMORY, fits, largest, next_length
from training.isolated import Isolated, IsolatedError, in_turn
from training.measure_step import measurer
from training.providers import PREFERENCE_PROVIDERS, PROVIDERS, Provider
from training.runs import PREFERENCES, RUNS
from training.shapes import config_of
from training.step_trace import KINDS, kind_of, memory_over_time, self_times, time_shares
from training.training_step import TrainingStep, build, random_batch

CPU = torch.device("cpu")


def test_providers_and_their_options():
    assert Provider.parse("hf") == Provider("hf")
    parsed = Provider.parse("ours-compile:recompute=cheap,tile_bytes=1024,rope=false")
    assert parsed == Provider("ours-compile", {"recompute": "cheap", "tile_bytes": 1024, "rope": False})
    assert Provider.parse("ours:recompute=norms") == Provider("ours", {"recompute": "norms"})
    assert plots.name_of("ours:recompute=cheap") == "liger_trainer, recompute=cheap"
    for each in PROVIDERS:
        assert plots.name_of(each) and plots.colour_of(each)
    assert set(PREFERENCE_PROVIDERS) < set(PROVIDERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [("theirs", "one of hf, .*got 'theirs'"), ("ours:rope", "name=value, got 'rope'"), ("hf:rope=1", "only ours")],
)
def test_wrong_providers(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        Provider.parse(text)
    with pytest.raises(SystemExit):
        headline.read_options(["steps", "--providers", text])
    assert capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_configs_and_small_forms(name):
    run = RUNS[name]
    config = config_of(run.shape)
    assert config.vocab_size == run.shape[1]["vocab_size"] and not config.use_cache
    assert run.tokens == run.batch * run.length * (2 if run.task in PREFERENCES else 1)
    tiny = run.tiny()
    assert tiny.shape[1]["vocab_size"] == 512 and (tiny.task, tiny.checkpointing) == (run.task, run.checkpointing)
    assert tiny.tokens <= 256


def test_half_of_the_labels_are_ignored():
    run = replace(RUNS["llama-1b-half"], batch=3, length=1024)
    batch = random_batch(run, 100, CPU)
    ignored = batch["labels"] == -100
    assert ignored.sum(1).tolist() == [512] * 3
    assert torch.equal(batch["labels"][~ignored], batch["input_ids"][~ignored])
    assert not torch.equal(ignored[0], ignored[1])  # not the same spans everywhere


def search(limit, **settings):
    """Lengths in the order in which they are tried, where what is longer than ``limit`` doesn't fit."""
    settings = {"start": 1024, "multiple": 256, "precision": 1 / 16, "longest": 2**20} | settings
    tried: dict[int, bool] = {}
    while (length := next_length(tried, **settings)) is not None:
        assert length not in tried
        tried[length] = length <= limit
    return tried


def test_the_next_process_starts_while_one_is_at_work():
    happened: list[str] = []

    class Process(Isolated):
        def __init__(self, name):
            self.name = name
            happened.append(f"start {name}")

        def close(self):
            happened.append(f"close {self.name}")

    with closing(in_turn(partial(Process, name) for name in "abc")) as processes:
        assert next(processes).name == "a"
        assert happened == ["start a", "start b"]
        assert next(processes).name == "b"
        assert happened[2:] == ["close a", "start c"]
    assert sorted(happened[4:]) == ["close b", "close c"]  # also where nobody asks for the rest


def test_search_for_the_largest_context():
    tried = search(9000)
    assert list(tried)[:5] == [1024, 2048, 4096, 8192, 16384]
    good, bad = max(n for n in tried if tried[n]), min(n for n in tried if not tried[n])
    assert good <= 9000 < bad <= good * (1 + 1 / 16) and good % 256 == 0
    assert len(tried) <= 9
    assert max(n for n in search(9000, precision=0.0) if n <= 9000) == 8960  # to the multiple
    assert list(search(700)) == [1024, 512, 768]  # shorter than the start
    assert list(search(100)) == [1024, 512, 256]  # nothing fits
    assert list(search(10**9, longest=5000)) == [1024, 2048, 4096, 5000]


@pytest.mark.parametrize("most", [700, 1024, 5000, 70_000, 163_840])
@pytest.mark.parametrize("precision", [0.0, 1 / 16])
def test_peaks_say_where_to_look_for_the_largest_context(most, precision):
    tried, peaks = {}, {}
    while (length := next_length(tried, 1024, 1024, precision, 2**20, peaks, capacity=1000.0)) is not None:
        assert length % 1024 == 0 and length not in tried
        tried[length] = length <= most
        if tried[length]:
            peaks[length] = 100 + 900 * length / most
    good, bad = max((n for n in tried if tried[n]), default=0), min(n for n in tried if not tried[n])
    assert bad <= max(good + 1024, good * (1 + precision)) and good <= most < bad
    assert len(tried) <= (12 if precision == 0 else 6)


def test_points_of_a_curve_come_before_the_search():
    options = headline.read_options(["contexts", "--points-until", "8192"])
    rows: list[dict] = []
    while (length := headline.length_to_try(rows, options)) is not None:
        error, peak = (None, 100 + length / 100) if length <= 80_000 else (OUT_OF_MEMORY, None)
        rows.append(row(length, error) | {"peak_bytes": peak, "capacity_bytes": peak and 900})
    lengths = [each["shape"]["length"] for each in rows]
    assert lengths[:4] == [1024, 2048, 4096, 8192] and 75_000 < lengths[4] < 80_000
    assert len(lengths) <= 7 and largest(rows)[0] * 17 / 16 + 1024 >= largest(rows)[1]


def row(length, error):
    return {"shape": {"length": length}, "error": error}


def test_rows_say_what_fits():
    rows = [row(1024, None), row(2048, None), row(4096, OUT_OF_MEMORY)]
    assert fits(rows) == {1024: True, 2048: True, 4096: False}
    assert largest(rows) == (2048, 4096)
    assert largest(rows[:2]) == (2048, None)
    assert fits([*rows, row(3072, "took more than 9 s")]) is None  # nothing can be concluded: the search ends


@pytest.mark.parametrize(
    ("request_", "seconds", "reason"),
    [
        ("memory", 60, "out of memory"),
        ("cpu memory", 60, "out of memory"),
        (None, 60, "TypeError: unsupported operand"),
        ("crash", 60, "the process ended with exit code 7"),
        ("sleep", 0.5, "took more than 0 s"),
    ],
)
def test_what_goes_wrong_in_a_process_of_its_own(request_, seconds, reason):
    with Isolated(answering) as process:
        assert process.ask(21, 120) == 42
        assert process.ask(4, 120) == 8
        with pytest.raises(IsolatedError, match=reason) as caught:
            process.ask(request_, seconds)
    if request_ == "crash":
        assert "last words" in caught.value.output


def kernel(name, ts, dur, cat="kernel", tid=7):
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


def test_time_by_kind_of_work_on_a_device():
    events = [
        kernel("step", 1000.0, 10_000.0, "user_annotation"),
        kernel("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", 1000.0, 2000.0),
        kernel("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", 3000.0, 1000.0),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 4000.0, 1500.0),
        kernel("_rms_norm_forward", 5500.0, 500.0),
        kernel("triton_poi_fused_mul_0", 5750.0, 500.0),  # beside the one before, on another stream
        kernel("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 7000.0, 1000.0),
        kernel("void at::native::elementwise_kernel<128, 4>", 8000.0, 250.0),
        kernel("Memcpy DtoD (Device -> Device)", 9000.0, 250.0, "gpu_memcpy"),
        kernel("aten::mm", 1000.0, 9.0, "cpu_op"),  # the host's part counts for nothing
    ]
    shares = time_shares(events, {"_rms_norm_forward"})
    assert shares == {
        "matrix products": 3.0,
        "attention": 1.5,
        "fused kernels": 1.0,
        "optimizer": 1.0,
        "the rest": 0.5,
        "idle": pytest.approx(10 - 3 - 1.5 - 0.75 - 1 - 0.5),
    }
    assert tuple(shares) == KINDS


def test_self_times_of_nested_ops():
    events = [
        kernel("outer", 0.0, 10.0),
        kernel("inner", 2.0, 3.0),
        kernel("innermost", 3.0, 1.0),
        kernel("inner", 6.0, 2.0),
        kernel("other thread", 1.0, 4.0, tid=8),
    ]
    found = sorted(self_times(events))
    assert found == [("inner", 2.0), ("inner", 2.0), ("innermost", 1.0), ("other thread", 4.0), ("outer", 5.0)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64", "matrix products"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::_fused_adamw_", "optimizer"),
        ("liger_trainer::rms_norm", "fused kernels"),
        ("aten::mul", "the rest"),
    ],
)
def test_kind_of_a_kernel(name, kind):
    assert kind_of(name, set()) == kind


def test_memory_over_the_time_of_a_step():
    weight = torch.nn.Parameter(torch.zeros(2**20))  # 4 MiB, and as much again for each of Adam's moments
    optimizer = torch.optim.AdamW([weight], fused=True)
    model = torch.nn.Module()
    model.weight = weight

    def loss():
        return (weight * weight.exp()).sum()

    step = TrainingStep(model, optimizer, loss)
    for _ in range(2):
        step()
    found = memory_over_time(step, CPU)
    mib = 2**20
    assert len(found["mb"]) == 400 and list(found["phases"]) == ["forward", "backward", "optimizer"]
    assert min(found["mb"]) >= 12 * mib / 1e6 - 0.1  # weight and moments are always there
    begun = int(len(found["mb"]) * found["phases"]["optimizer"][0] / found["ms"]) + 1
    assert max(found["mb"][begun:]) == pytest.approx(16 * mib / 1e6, abs=0.1)  # and the gradient, until it is let go
    # Forward: the exponential is kept, the product is not; in the backward at the least the gradient comes on top.
    assert 20 * mib <= found["peak_bytes"] <= 40 * mib
    assert max(found["mb"]) == pytest.approx(found["peak_bytes"] / 1e6, abs=0.1)


@pytest.mark.parametrize(
    "name", ["llama-1b-half", "llama-8b-lora", "llama-1b-dpo", "llama-1b-orpo", "qwen3-0.6b-simpo"]
)
def test_ours_computes_the_loss_of_the_stock_step(name):
    """In fp32, where they differ by rounding alone."""
    run = RUNS[name].tiny()
    losses = []
    for provider in ("trl", "ours"):
        torch.manual_seed(0)
        step = build(run, Provider.parse(provider), CPU, dtype=torch.float32)
        losses.append([float(step()) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_dry_run_of_everything(tmp_path, capsys):
    """Two providers and a missing one, steps and contexts, until memory ends; continued; drawn."""
    pytest.importorskip("matplotlib")
    common = ["--tiny", "--results", str(tmp_path)]
    steps = ["steps", *common, "--runs", "llama-1b", "--warmup", "1", "--steps", "2"]
    assert headline.main([*steps, "--providers", "hf"]) == 0
    assert headline.main([*steps, "--providers", "hf", "ours:recompute=cheap", "--minutes", "0.1"]) == 3
    assert "goes on from here" in capsys.readouterr().err
    assert headline.main([*steps, "--providers", "hf", "ours:recompute=cheap", "ours:no_such_option=1"]) == 0
    printed = capsys.readouterr()
    assert "[1/2, round 1] llama-1b ours:recompute=cheap" in printed.err  # hf is on file
    rows = {each["provider"]: each for each in Record.load(tmp_path / "training_steps_cpu.json").rows}
    assert list(rows) == ["hf", "ours:recompute=cheap", "ours:no_such_option=1"]
    assert "unknown option 'no_such_option'" in rows["ours:no_such_option=1"]["error"]
    for each in (rows["hf"], rows["ours:recompute=cheap"]):
        assert each["step_ms"][1] > 0 and each["steps"] == 2 and each["peak_bytes"] > 0
        assert each["shares_ms"]["matrix products"] > 0 and each["memory"]["peak_bytes"] > 0
    assert rows["ours:recompute=cheap"]["shares_ms"]["fused kernels"] > 0
    assert "1 recompute" in rows["ours:recompute=cheap"]["patched"]
    assert rows["ours:recompute=cheap"]["first_loss"] == pytest.approx(rows["hf"]["first_loss"], rel=1e-3)

    contexts = ["contexts", *common, "--runs", "llama-1b-context", "--providers", "hf", "--warmup", "1", "--steps", "2"]
    contexts += ["--start", "64", "--multiple", "64", "--longest", "192"]
    assert headline.main(contexts) == 0
    found = Record.load(tmp_path / "training_contexts_cpu.json").rows
    assert [each["shape"]["length"] for each in found] == [64, 128, 192]
    drawn = plots.draw_all(tmp_path)
    kinds = (
        "steps_llama-1b_bars",
        "steps_llama-1b_memory",
        "steps_llama-1b_shares",
        "contexts_llama-1b-context_curves",
    )
    assert [each.name for each in drawn] == [f"training_{kind}_cpu.png" for kind in kinds]
    assert all(each.stat().st_size > 10_000 for each in drawn)
    report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "### Training steps" in page and "**Llama-3.2-1B, 4 × 4096**" in page
    assert "| **liger_trainer, no_such_option=1** |  |  |  |  | TypeError: unknown option" in page
    assert "| Hugging Face | 192 (1.00 ×) | not reached |  |" in page
    assert f"![{drawn[0].stem.replace('_', ' ')}]({drawn[0].name})" in page


@pytest.mark.parametrize(("asked", "measured"), [("none", False), ("llama-1b-half", False), ("llama-1b", True)])
def test_memory_curves_of_the_runs_that_are_asked_for(asked, measured, tmp_path):
    steps = ["steps", "--tiny", "--results", str(tmp_path), "--runs", "llama-1b", "--providers", "hf"]
    assert headline.main([*steps, "--warmup", "1", "--steps", "2", "--memory-curves", asked]) == 0
    (row,) = Record.load(tmp_path / "training_steps_cpu.json").rows
    assert row["error"] is None and ("memory" in row) == measured


def test_a_limit_of_memory_ends_in_a_row():
    with Isolated(measurer, RUNS["llama-1b"].tiny(), "hf", 2**31) as process:
        request = {"what": "time", "warmup": 0, "steps": 1, "seconds": 1, "shares": False}
        with pytest.raises(IsolatedError, match="^out of memory$"):
            process.ask(request | {"length": 2**22}, 120)
