"""Tokens per second and peak memory of training steps of a Llama, under each provider, in a fresh process each.

    python benchmarks/training/sft_step.py --providers hf liger-kernel ours --results benchmarks/results/sft_step.json

The model has the shape of Llama-3.2-1B and random weights in bf16; AdamW (fused) has its state in bf16. Nothing is
checkpointed; ours-recompute rebuilds norms and activations in the backward. Runs on any torch device; a provider that
can't run gets a row that says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PROVIDERS = ("hf", "hf-compile", "liger-kernel", "ours", "ours-recompute", "ours-compile")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
}


def build(shape: str, provider: str, device: torch.device) -> torch.nn.Module:
    import transformers

    if provider == "liger-kernel":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, use_cache=False)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return prepared(model, provider)


def prepared(model: torch.nn.Module, provider: str) -> torch.nn.Module:
    """model as the provider trains it, but for what a provider has to do before there is a model."""
    model.train()
    if provider.startswith("ours"):
        import liger_trainer

        options = {"recompute": "cheap"} if provider == "ours-recompute" else {}
        print(liger_trainer.apply_liger_kernel(model, **options).line(), file=sys.stderr)
    return torch.compile(model) if provider.endswith("-compile") else model


def measure(shape: str, provider: str, *settings: int) -> dict[str, Any]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    return {"provider": provider} | measure_model(build(shape, provider, device), device, *settings)


def measure_model(
    model: torch.nn.Module, device: torch.device, batch: int, length: int, warmup: int, steps: int
) -> dict[str, Any]:
    """Time training steps of model on random tokens: the median of the steps after the warmup, and the peak memory."""
    accelerator = device.type != "cpu"
    module = torch.get_device_module(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device, generator=generator)
    times, losses = [], []
    for step in range(warmup + steps):
        if accelerator:
            torch.accelerator.synchronize()
            if step == warmup:
                module.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if accelerator:
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
    seconds = statistics.median(times[warmup:])
    return {
        "seconds_per_step": seconds,
        "seconds_min_max": [min(times[warmup:]), max(times[warmup:])],
        "tokens_per_second": batch * length / seconds,
        "peak_gb": module.max_memory_allocated() / 1e9 if accelerator else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers", "liger-kernel", "liger-trainer"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if "error" not in row]
    names = [row["provider"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, key, label in zip(
        axes, ("tokens_per_second", "peak_gb"), ("tokens per second", "peak memory (GB)"), strict=True
    ):
        bars = axis.barh(
            names, [row[key] or 0 for row in rows], color=["C0" if "ours" in name else "0.7" for name in names]
        )
        axis.bar_label(bars, fmt="{:,.0f}" if key == "tokens_per_second" else "{:.1f}", padding=3)
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["hf", "liger-kernel", "ours"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=10, help="measured steps; the median counts")
    parser.add_argument("--rounds", type=int, default=1, help="run all providers so often; their median runs count")
    parser.add_argument("--results", type=Path, help="JSON file to write; a PNG goes beside it")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = (options.batch, options.length, options.warmup, options.steps)
    if options.worker:
        print(json.dumps(measure(options.shape, options.worker, *settings)))
        return

    runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in options.providers}
    for _ in range(options.rounds):
        for provider in options.providers:
            result = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--worker", provider], capture_output=True, text=True
            )
            lines = result.stdout.strip().splitlines()
            if result.returncode or not lines:
                row = {"provider": provider, "error": (result.stderr.strip().splitlines() or ["no output"])[-1]}
            else:
                row = json.loads(lines[-1])
            print(json.dumps(row), flush=True)
            runs[provider].append(row)
    rows = []
    for of_provider in runs.values():
        good = sorted((row for row in of_provider if "error" not in row), key=lambda row: row["seconds_per_step"])
        rows.append(good[len(good) // 2] if good else of_provider[0])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.get_device_module(device).get_device_name() if device else "CPU"
    header = f"{'provider':15} {'tokens/s':>10} {'peak GB':>8} {'first loss':>10} {'last loss':>10}"
    print(header)
    for row in rows:
        if "error" in row:
            print(f"{row['provider']:15} {row['error']}")
        else:
            print(
                f"{row['provider']:15} {row['tokens_per_second']:10,.0f} {row['peak_gb'] or 0:8.2f} "
                f"{row['first_loss']:10.4f} {row['last_loss']:10.4f}"
            )
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        setting = {key: getattr(options, key) for key in ("shape", "batch", "length", "warmup", "steps", "rounds")}
        record = {
            "benchmark": "sft_step",
            "device": name,
            "date": date.today().isoformat(),
            "versions": versions(),
            "setting": setting | {"dtype": "bfloat16", "optimizer": "AdamW(fused=True), bf16 state"},
            "rows": rows,
        }
        options.results.write_text(json.dumps(record, indent=2) + "\n")
        title = f"{options.shape}, batch {options.batch} × {options.length}, bf16, AdamW, {name}"
        draw(rows, title, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
