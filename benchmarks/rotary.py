"""Rotary position embedding of queries and keys, forward and backward: ``python benchmarks/rotary.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.peers import compiled, liger_kernel
from harness.run import main

BASE = 10000.0


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' apply_rotary_pos_emb."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return rotated(q), rotated(k)


def build_ours(case: Case) -> Op:
    from liger_trainer.kernels import rotary

    return rotary


def build_hf(case: Case) -> Op:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    def heads(number: int, grad: bool) -> Tensor:
        memory = randn(generator, case, case.batch, case.sequence, number, case.head_dim, grad=False)
        return memory.transpose(1, 2).requires_grad_(grad)  # as a projection's result is viewed

    q, k, dq, dk = (heads(number, grad) for grad in (True, False) for number in (case.heads, case.kv_heads))
    exponents = torch.arange(0, case.head_dim, 2, device=device, dtype=torch.float32) / case.head_dim
    angles = torch.outer(torch.arange(case.sequence, device=device, dtype=torch.float32), BASE**-exponents)
    angles = torch.cat((angles, angles), dim=-1)[None]
    return Inputs((q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype)), (dq, dk))


def floor_bytes(case: Case) -> int:
    elements = case.batch * case.sequence * (case.heads + case.kv_heads) * case.head_dim
    return 4 * elements * case.torch_dtype.itemsize


IN_PLACE = "writes over q, k and their outputs' gradients"
LLAMA_3 = {"heads": 32, "kv_heads": 8, "head_dim": 128}
BENCHMARK = Benchmark(
    name="rotary",
    title="Rotary position embedding",
    about=(
        "Queries and keys are transposed views, as Hugging Face's models have them. Floor: a copy of both, their "
        "results, and the gradients of those and of these."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours),
        "hf": Provider(build_hf, requires=("transformers",), note="apply_rotary_pos_emb"),
        "compile": compiled(formula),
        "liger": liger_kernel(build_liger, overwrites=True, note=IN_PLACE),
        "liger-cutedsl": liger_kernel(build_liger, cutedsl=True, overwrites=True, note=IN_PLACE),
    },
    tiny=Case(batch=1, sequence=16, heads=4, kv_heads=2, head_dim=64),
    bars=[Case(batch=4, sequence=2048, **LLAMA_3)],
    sweeps=[
        Sweep(
            "sequence",
            "Rotary embedding, batch 4, 32 + 8 heads of 128, bf16",
            "sequence",
            "sequence length",
            [Case(batch=4, sequence=sequence, **LLAMA_3) for sequence in (512, 1024, 2048, 4096)],
        )
    ],
    floor_bytes=floor_bytes,
)

if __name__ == "__main__":
    main(BENCHMARK)
