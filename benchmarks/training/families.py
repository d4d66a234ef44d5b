"""Tokens per second and peak memory of a training step of eight families at about 1B, under each provider.

    python benchmarks/training/families.py --results benchmarks/results/families.json
    python benchmarks/training/families.py --families llama qwen3 gemma3_text --providers hf-compile ours-compile \\
        --seconds 180 --results benchmarks/results/families_compiled.json

Every family has the layer sizes of a real model of about a billion parameters, random weights in bf16, AdamW (fused)
with its state in bf16, and nothing is recomputed. Each run has a process of its own. ``--seconds`` bounds it: what
does not end in time gets a row that says so. Runs on any torch device; ``--shape tiny`` shows on a CPU that it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sft_step import SHAPES, measure_model, prepared, versions

PROVIDERS = ("hf", "liger-kernel", "ours", "hf-compile", "ours-compile")

# Fields of the config, by model type. Layers are those of the real model, fewer where it is much larger than 1B, so
# that a step of the untouched model fits into 80 GB.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPES["llama-3.2-1b"],
    "qwen3": {  # Qwen3-1.7B, 16 of 28 layers
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "gemma3_text": {  # gemma-3-1b
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
        "tie_word_embeddings": True,
    },
    "phi3": {  # Phi-3-mini-4k, 8 of 32 layers
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
    },
    "mistral": {  # Mistral-7B-v0.3, 4 of 32 layers
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None, "tie_word_embeddings": False,
    },
    "olmo2": {  # OLMo-2-0425-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 100352, "tie_word_embeddings": False,
    },
    "granite": {  # granite-3.1-2b, 20 of 40 layers
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
    "qwen3_moe": {  # Qwen3-30B-A3B, 3 of 48 layers, 64 of 128 experts
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 3,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip

# What makes a config of any family small enough for a CPU.
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def build(family: str, provider: str, tiny: bool, device: torch.device) -> torch.nn.Module:
    import transformers

    if provider == "liger-kernel":
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{family}")()
    fields = dict(FAMILIES[family])
    if tiny:
        fields |= {name: value for name, value in TINY.items() if name in fields}
    # The default padding token of some families lies outside of a small vocabulary.
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config_class = transformers.CONFIG_MAPPING[family]
    config = config_class(**fields, **tokens, max_position_embeddings=8192, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return prepared(model, provider)


def run(options: argparse.Namespace, family: str, provider: str) -> dict[str, Any]:
    """One provider on one family, in a process of its own."""
    command = [sys.executable, __file__, "--worker", family, provider, "--batch", str(options.batch)]
    for name in ("length", "warmup", "steps", "shape"):
        command += [f"--{name}", str(getattr(options, name))]
    row: dict[str, Any] = {"family": family, "provider": provider}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        return row | {"error": f"took more than {options.seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return row | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return row | json.loads(lines[-1])


def table(rows: list[dict[str, Any]], providers: list[str]) -> str:
    """One line a family: tokens per second, then peak memory, of every provider."""
    found = {(row["family"], row["provider"]): row for row in rows}
    header = ["family", *(f"{p} tok/s" for p in providers), *(f"{p} GB" for p in providers), "first loss differs by"]
    lines = [header]
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [found[family, provider] for provider in providers if (family, provider) in found]
        losses = [row["first_loss"] for row in of_family if "first_loss" in row]
        lines.append([
            family,
            *(f"{row['tokens_per_second']:,.0f}" if "error" not in row else "-" for row in of_family),
            *(f"{row['peak_gb'] or 0:.1f}" if "error" not in row else "-" for row in of_family),
            f"{max(losses) - min(losses):.4f}" if losses else "-",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS[:3]))
    parser.add_argument("--shape", choices=("1b", "tiny"), default="1b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=5, help="measured steps; the median counts")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of one run")
    parser.add_argument("--results", type=Path, help="JSON file to write, after every run")
    parser.add_argument("--worker", nargs=2, metavar=("FAMILY", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = (options.batch, options.length, options.warmup, options.steps)
    if options.worker:
        family, provider = options.worker
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        model = build(family, provider, options.shape == "tiny", device)
        print(json.dumps(measure_model(model, device, *settings)))
        return

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    record = {
        "benchmark": "families",
        "device": torch.get_device_module(accelerator).get_device_name() if accelerator else "CPU",
        "date": date.today().isoformat(),
        "versions": versions(),
        "setting": {name: getattr(options, name) for name in ("shape", "batch", "length", "warmup", "steps")}
        | {"dtype": "bfloat16", "optimizer": "AdamW(fused=True), bf16 state"},
        "rows": [],
    }
    rows: list[dict[str, Any]] = record["rows"]  # type: ignore[assignment]
    for family in options.families:
        for provider in options.providers:
            rows.append(run(options, family, provider))
            print(json.dumps(rows[-1]), flush=True)
            if options.results:
                options.results.parent.mkdir(parents=True, exist_ok=True)
                options.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows, options.providers))


if __name__ == "__main__":
    main()
