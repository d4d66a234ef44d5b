"""Calculate the memory a GPU that a training step takes, and write docs/memory.md.

    python benchmarks/training/memory_model.py

Nothing is measured here. The bytes of every tensor that exists at a step's two high points, the loss and the backward
of a layer, are added up from the model's shape; the page compares the sums with every measured run in
benchmarks/results that the formulas cover, and states the error of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

from training.contexts import next_length
from training.runs import RUNS
from training.shapes import SHAPES as MODELS
from training.sharded_shapes import SHAPES, LlamaShape

__all__ = ["Setting", "measured", "page", "peak_bytes"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
PROVIDERS = ("hf", "liger-kernel", "ours")
# Which of parameters, gradients and optimizer state a strategy divides over the GPUs.
DIVIDED = {
    "one": (False, False, False),
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp1": (True, True, True),
    "fsdp2": (True, True, True),
}
BOUND = 0.03  # of the calculated peak's error on one GPU, which the tests hold it to


@dataclass(frozen=True)
class Setting:
    """One training step on each of ``gpus``: ``batch`` sequences of ``length`` tokens a GPU, weights in bf16."""

    shape: LlamaShape
    provider: str
    strategy: str = "one"
    gpus: int = 1
    batch: int = 1
    length: int = 4096
    checkpointing: bool = False
    optimizer_bytes: int = 4  # a parameter: both moments of AdamW in bf16; 12 with both and a copy of it in fp32

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def norm_bytes(provider: str) -> int:
    """A number of the hidden size that a norm and its output keep: transformers' keeps it in fp32, in bf16, and out."""
    return 8 if provider == "hf" else 4


def layer_bytes(setting: Setting) -> int:
    """What a token's forward through one layer keeps for the backward."""
    shape = setting.shape
    norms = 2 * norm_bytes(setting.provider) * shape.hidden_size
    # q, k and v as attention takes them, its output, which o_proj takes, and its log-sum-exp.
    attention = 2 * (2 * shape.attention_size + 2 * shape.key_value_size) + 4 * shape.num_attention_heads
    # gate, up, their product; where each op keeps its own inputs, the activated gate as well.
    mlp = 2 * shape.intermediate_size * (4 if setting.provider == "hf" else 3)
    return norms + attention + mlp


def loss_bytes(setting: Setting) -> int:
    """What head and loss hold at their high point, beyond the head's weight and the layers' activations."""
    shape, tokens = setting.shape, setting.tokens
    if setting.provider == "hf":
        return 3 * 4 * tokens * shape.vocab_size  # fp32: log-probabilities, their gradient and that of the logits
    hidden_gradient, weight = 2 * tokens * shape.hidden_size, shape.head_parameters
    if setting.provider == "liger-kernel":
        chunks = -(-shape.vocab_size // shape.hidden_size)
        rows = 1 << (-(-tokens // chunks) - 1).bit_length()
        return hidden_gradient + 2 * weight + 2 * min(rows, tokens) * shape.vocab_size
    logits = 2 * tokens * shape.vocab_size
    tile = max(2 * weight, 256 * 2**20)
    # An fp32 buffer and a tile; or all logits at once and the rounded gradient, where that takes no more.
    return hidden_gradient + min(4 * weight + min(tile, logits), logits + 2 * weight)


def peak_bytes(setting: Setting) -> int:
    """The most that tensors of one GPU take within a step, the optimizer's state being there already."""
    shape, gpus = setting.shape, setting.gpus
    weights, gradients, state = (gpus if divided else 1 for divided in DIVIDED[setting.strategy])
    held = shape.parameters * 2 // weights + shape.parameters * setting.optimizer_bytes // state
    kept_gradients = shape.parameters * 2 // gradients
    # What is whole for the time of its use: embedding and head from the forward on, a layer and the one fetched ahead.
    gathered_root = 2 * shape.root_parameters if weights > 1 else 0
    gathered_layers = 2 * 2 * shape.layer_parameters if weights > 1 else 0
    # Gradients are whole until they are added up over the GPUs: of the head, and of a layer; under DDP in its buckets.
    whole_gradients = 2 * (shape.root_parameters + shape.layer_parameters) if gradients > 1 else 0
    if setting.strategy == "ddp":
        held += shape.parameters * 2

    stored = 2 * shape.hidden_size if setting.checkpointing else layer_bytes(setting)
    ends = setting.tokens * norm_bytes(setting.provider) * shape.hidden_size  # the final norm
    kept = setting.tokens * stored * shape.num_hidden_layers + ends
    at_loss = held + gathered_root + kept + loss_bytes(setting)
    # In the last layer's backward: what was computed again for it, gradients of gate, up and the residual stream.
    again = setting.tokens * layer_bytes(setting) if setting.checkpointing else 0
    # Liger-Kernel writes the gradients of gate and up over them, while that of their product is there.
    of_mlp = 1 if setting.provider == "liger-kernel" else 2
    flowing = setting.tokens * 2 * (of_mlp * shape.intermediate_size + 2 * shape.hidden_size)
    first_gradients = whole_gradients if gradients > 1 else 2 * shape.root_parameters
    in_layer = held + gathered_root + gathered_layers + kept - ends + again + flowing + first_gradients
    at_update = held + kept_gradients
    return max(at_loss, in_layer, at_update)


def measured(folder: Path = RESULTS) -> Iterator[tuple[str, Setting, float]]:
    """(file, setting, bytes) of every measured run that the formulas cover."""
    for path in sorted(folder.glob("*.json")):
        record: dict[str, Any] = json.loads(path.read_text())
        benchmark = record.get("benchmark", "") if isinstance(record, dict) else ""
        if benchmark == "sft_step":
            settings = record["setting"]
            for row in record["rows"]:
                if row["provider"] in PROVIDERS and row.get("peak_gb"):
                    setting = Setting(
                        SHAPES[settings["shape"]],
                        row["provider"],
                        batch=settings["batch"],
                        length=settings["length"],
                    )
                    yield path.name, setting, row["peak_gb"] * 1e9
        elif benchmark == "training_steps":
            for row in record["rows"]:
                run = RUNS[row["shape"]["run"]]
                name = next((name for name, shape in MODELS.items() if shape is run.shape and name in SHAPES), None)
                plain = run.task == "sft" and not run.lora_rank and not run.ignored and row["provider"] in PROVIDERS
                if plain and name is not None and row.get("peak_bytes"):
                    size = {"batch": row["shape"]["batch"], "length": row["shape"]["length"]}
                    setting = Setting(SHAPES[name], row["provider"], **size, checkpointing=run.checkpointing)
                    yield path.name, setting, float(row["peak_bytes"])
        elif benchmark.startswith("distributed_"):
            for row in record["rows"]:
                shape = row["shape"]
                covered = (
                    row["provider"] in PROVIDERS
                    and row.get("peak_bytes")
                    and shape["task"] == "sft"
                    # Under sharding, accelerate's Trainer makes choices of its own: fp32 weights, buckets.
                    and (not shape["trainer"] or shape["strategy"] == "ddp")
                )
                if covered and shape["model"] != "tiny":
                    setting = Setting(
                        SHAPES[shape["model"]],
                        row["provider"],
                        shape["strategy"] if shape["gpus"] > 1 else "one",
                        shape["gpus"],
                        shape["batch"],
                        shape["length"],
                        shape["checkpointing"],
                        # DeepSpeed keeps moments and a copy of the weights in fp32.
                        12 if shape["strategy"].startswith("zero") else 4,
                    )
                    yield path.name, setting, float(row["peak_bytes"])


def name_of(shape: LlamaShape) -> str:
    return next(name for name, each in SHAPES.items() if each == shape)


def error(setting: Setting, found: float) -> float:
    """How far the calculation is off, relative to what was measured; above 0 where it says more."""
    return peak_bytes(setting) / found - 1


def largest_length(setting: Setting, capacity: int) -> int:
    """The longest sequence, in steps of 1024 tokens, whose step fits; 0 where none does."""
    tried: dict[int, bool] = {}
    while (length := next_length(tried, 1024, 1024, 0.0, 2**22)) is not None:
        tried[length] = peak_bytes(replace(setting, length=length)) <= capacity
    return max((length for length, fits in tried.items() if fits), default=0)


HEAD = f"""\
# Memory on many GPUs

<!-- Written by `make memory-report` (python benchmarks/training/memory_model.py). Do not edit. -->

**The tables of this page are calculated**, not measured, but for the column that says so. They add up the tensors that
exist at a step's high points: weights, gradients and AdamW's state by what a strategy divides over the GPUs; what each
layer keeps for the backward; and what head and loss hold. Counted is what PyTorch allocates: the CUDA context, NCCL's
buffers and fragmentation come on top. GB are 1e9 bytes.

## How good the calculation is

Every measured run in `benchmarks/results` that the formulas cover; on one GPU a test holds the error below {BOUND:.0%}.

"""

ASSUMPTIONS = """
## Llama-3-8B and 70B

Weights and gradients in bf16, attention without a matrix of scores. "bf16": AdamW's moments in bf16, 4 bytes a
parameter. "fp32": moments and a master copy in fp32, 12 bytes. ZeRO-3 stands for FSDP1 and FSDP2 as well: two layers
are gathered at a time, embedding and head stay gathered from the forward to the backward, and the gradients of head and
one layer are whole until they are reduced. ZeRO-2 keeps the weights whole. Every GPU trains on its own sequences. "hf"
is transformers as it is.
"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    from report import table as markdown

    return markdown(columns, "l" + "r" * (len(columns) - 1), rows)


def in_gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f}"


def sizes_section(name: str, batch: int, length: int) -> str:
    lines = []
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        cells = [str(gpus)]
        for strategy in ("zero1", "zero2", "zero3"):
            for optimizer_bytes in (4, 12):
                base = Setting(SHAPES[name], "hf", strategy, gpus, batch, length, True, optimizer_bytes)
                cells.append(" → ".join(in_gb(peak_bytes(replace(base, provider=each))) for each in ("hf", "ours")))
        lines.append(cells)
    stages = ("ZeRO-1", "ZeRO-2", "ZeRO-3 / FSDP")
    columns = ["GPUs", *(f"{stage}, {state}" for stage in stages for state in ("bf16", "fp32"))]
    return (
        f"\n### {name}, {batch} × {length:,} tokens a GPU, layers recomputed\n\n"
        f"GB a GPU, calculated: hf → liger_trainer.\n\n{table(columns, lines)}"
    )


def lengths_section(name: str, batch: int, capacity: int) -> str:
    lines = []
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        cells = [str(gpus)]
        for checkpointing in (True, False):
            for provider in PROVIDERS:
                setting = Setting(SHAPES[name], provider, "zero3", gpus, batch, 0, checkpointing)
                found = largest_length(setting, capacity)
                cells.append(f"{found // 1024}k" if found else "none")
        lines.append(cells)
    labels = ("hf", "Liger-Kernel", "liger_trainer")
    columns = ["GPUs", *(f"{label}{kept}" for kept in (", recomputed", ", all kept") for label in labels)]
    return (
        f"\n### {name}: the longest sequence, {batch} a GPU, ZeRO-3 / FSDP, bf16, {capacity / 1e9:.0f} GB\n\n"
        f"Calculated, in 1,024 tokens, without a reserve for what is not counted.\n\n{table(columns, lines)}"
    )


def page(results: Path = RESULTS) -> str:
    lines = []
    for file, setting, found in measured(results):
        what = f"{name_of(setting.shape)}, {setting.batch} × {setting.length}, {setting.provider}"
        if setting.gpus > 1:
            what += f", {setting.strategy} on {setting.gpus}"
        what += ", layers recomputed" if setting.checkpointing else ""
        off = f"{error(setting, found):+.1%}"
        lines.append([what, f"`{file}`", in_gb(found), in_gb(peak_bytes(setting)), off])
    parts = [HEAD, table(["run", "file", "measured, GB", "calculated, GB", "error"], lines), ASSUMPTIONS]
    parts += [sizes_section("llama-3-8b", 8, 4096), sizes_section("llama-3-70b", 1, 4096)]
    parts += [lengths_section("llama-3-8b", 1, 80 * 10**9), lengths_section("llama-3-70b", 1, 141 * 10**9)]
    return "".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    options.page.write_text(page(options.results))
    print(options.page)


if __name__ == "__main__":
    main()
