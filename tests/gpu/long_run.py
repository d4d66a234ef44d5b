"""Many training steps of a small patched model: memory, compilations, NaN, and the same result again.

    python -m tests.gpu.long_run                     # 2000 steps, twice, in two processes at once, on the GPU
    python -m tests.gpu.long_run --steps 20 --settle 10   # to try the script on a CPU

Lengths, masks and the number of labels differ from step to step; in between the model is evaluated and saved.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from liger_trainer import apply_liger_kernel
from liger_trainer.kernels import _launch

VOCABULARY, BATCH, LONGEST = 32003, 4, 512


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)  # bytes between steps
    compiled: list[int] = field(default_factory=list)  # kernels so far
    kernels: list[str] = field(default_factory=list)  # of what, in the order of their compilation
    parameters: list[Tensor] = field(default_factory=list)


def batch(step: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of a random length, of which a random part carries labels: now and then none at all."""
    generator = torch.Generator().manual_seed(step)
    length = int(torch.randint(2, LONGEST + 1, (), generator=generator))
    ids = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    padding = torch.arange(length) >= torch.randint(1, length + 1, (BATCH, 1), generator=generator)
    share = float(torch.rand((), generator=generator)) if step % 97 else 0.0
    labels = ids.masked_fill(padding | (torch.rand(ids.shape, generator=generator) > share), -100)
    made = {"input_ids": ids, "attention_mask": (~padding).long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in made.items()}


def run(steps: int, device: torch.device, show_progress: bool) -> Outcome:
    torch.use_deterministic_algorithms(True, warn_only=True)  # the embedding's gradient, which is PyTorch's
    torch.manual_seed(0)
    gc.freeze()  # the collections to come need not look at what the imports left
    # The fused attentions may add their gradients up in another order each time.
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=LONGEST, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    apply_liger_kernel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    outcome = Outcome()
    losses: list[Tensor] = []
    for step in trange(steps, disable=not show_progress, mininterval=5):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch(step, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 9:  # for the first time before all has to be compiled
            model.eval()
            with torch.no_grad():
                losses.append(model(**batch(-step, device)).loss)
            model.train()
        if step % 500 == 499:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
        if step % 10 == 9:
            gc.collect()
            outcome.allocated.append(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
            outcome.compiled.append(len(_launch._compiled))
    outcome.kernels = [f"{key[0].__name__} for {key[3:]}" for key in _launch._compiled]
    outcome.losses = torch.stack(losses).tolist()
    outcome.parameters = [parameter.detach().cpu() for parameter in model.parameters()]
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--settle", type=int, default=50, help="steps after which nothing may be compiled")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        first, second = processes.map(run, *zip((asked.steps, device, True), (asked.steps, device, False)))
    settled = asked.settle // 10 - 1
    kept = first.allocated[settled:]
    later = first.compiled[-1] - first.compiled[settled]
    same = all(map(torch.equal, first.parameters, second.parameters)) and first.losses == second.losses
    checks = {
        f"no NaN in {len(first.losses)} losses": all(map(math.isfinite, first.losses)),
        f"memory between steps grew by {kept[-1] - kept[0]} bytes, at most by {max(kept) - min(kept)}": max(kept)
        - min(kept)
        < 2**20,
        f"{later} kernels compiled after step {asked.settle}, {first.compiled[-1]} in all": later == 0,
        "the same losses and weights again, bit for bit": same,
    }
    for name, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED':<7}{name}")
    for kernel in first.kernels[first.compiled[settled] :]:
        print(f"       compiled late: {kernel}")
    print(f"{2 * asked.steps} steps on {device} in {time.perf_counter() - start:.0f} s")
    return not all(checks.values())


if __name__ == "__main__":
    sys.exit(main())
