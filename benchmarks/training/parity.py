"""The same optimizer steps of SmolLM2-135M-Instruct on real chats, with ``use_liger`` and without, loss beside loss.

    python benchmarks/training/parity.py --steps 20 --results benchmarks/results/parity_cpu.json

On a CPU in fp32; on an accelerator, with ``--bf16``, under bf16 autocast.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

from liger_trainer import TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "benchmarks")]
from harness.record import versions  # noqa: E402
from support.chats import load_chats, tokenise_chats  # noqa: E402
from support.measure import device_name  # noqa: E402
from support.models import find_model, load_model  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def train(use_liger: bool, options: argparse.Namespace) -> dict[str, Any]:
    set_seed(0)
    model, tokenizer = load_model(find_model(options.model), "float32", None)
    chats = load_chats("recipes/data/dialogues-train.jsonl", ROOT)
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            use_liger=use_liger,
            liger_config={"tile_bytes": options.tile_bytes},
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=5e-5,
            warmup_steps=3,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=options.bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=0,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=tokenise_chats(chats, tokenizer, options.length, packing=False, seed=0),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logged],
        "grad_norm": [float(entry["grad_norm"]) for entry in logged],
    }


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(record["stock"]["loss"]) + 1)
    figure, (curves, differences) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    curves.plot(steps, record["stock"]["loss"], color="0.6", linewidth=4, label="stock")
    curves.plot(steps, record["use_liger"]["loss"], color="C0", linewidth=1.5, label="use_liger=True")
    curves.set(xlabel="optimizer step", ylabel="training loss")
    curves.legend(frameon=False)
    for key, label in (("loss", "loss"), ("grad_norm", "gradient norm")):
        pairs = zip(record["use_liger"][key], record["stock"][key], strict=True)
        differences.semilogy(steps, [abs(a - b) / b + 1e-9 for a, b in pairs], label=label)
    differences.set(xlabel="optimizer step", ylabel="relative difference")
    differences.legend(frameon=False)
    for axis in (curves, differences):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"SmolLM2-135M, {record['setting']['dtype']}, {record['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens kept of a chat")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--tile-bytes", type=int, default=2 * 2**20, help="small, so that a step has several tiles")
    parser.add_argument("--model", default=MODEL, help="a folder or .gguf file instead of SmolLM2 from the hub")
    parser.add_argument("--results", type=Path, help="JSON file to write; a PNG goes beside it")
    options = parser.parse_args()
    runs = {name: train(name == "use_liger", options) for name in ("use_liger", "stock")}
    record = {
        "benchmark": "parity",
        "device": device_name(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")),
        "date": date.today().isoformat(),
        "versions": versions(),
        "setting": {key: getattr(options, key) for key in ("steps", "batch", "length", "tile_bytes")}
        | {"model": MODEL, "dtype": "bf16 autocast" if options.bf16 else "fp32"},
        "largest_relative_difference": {
            key: largest_difference(runs["use_liger"][key], runs["stock"][key]) for key in ("loss", "grad_norm")
        },
        **runs,
    }
    print(json.dumps(record["largest_relative_difference"]))
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(record, indent=2) + "\n")
        draw(record, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
