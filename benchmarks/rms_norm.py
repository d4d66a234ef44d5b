"""RMSNorm, forward and backward: ``python benchmarks/rms_norm.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.peers import compiled, liger_kernel, upcast
from harness.run import main

EPS = 1e-6


def formula(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm."""
    rows = upcast(x)
    return weight * (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def build_ours(case: Case) -> Op:
    from liger_trainer.kernels import rms_norm

    return lambda x, weight: rms_norm(x, weight, EPS)


def build_module(case: Case) -> Op:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(case.hidden, EPS)

    def op(x: Tensor, weight: Tensor) -> Tensor:
        module._parameters["weight"] = weight  # the benchmark's own, without the host time of functional_call
        return module(x)

    return op


def build_torch(case: Case) -> Op:
    return lambda x, weight: F.rms_norm(x, (case.hidden,), weight, EPS)


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    shape = (case.batch, case.sequence) if "batch" in case.sizes else (case.rows,)
    x, grad = (randn(generator, case, *shape, case.hidden, grad=each) for each in (True, False))
    weight = randn(generator, case, case.hidden, scale=0.1, grad=False).add_(1).requires_grad_()
    return Inputs((x, weight), (grad,))


def floor_bytes(case: Case) -> int:
    rows = case.batch * case.sequence if "batch" in case.sizes else case.rows
    return 5 * rows * case.hidden * case.torch_dtype.itemsize


IN_PLACE = "writes its input's gradient over its output's"
BENCHMARK = Benchmark(
    name="rms_norm",
    title="RMSNorm",
    about="Floor: a copy of x, y, dy, x again and dx.",
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours),
        "hf": Provider(build_module, requires=("transformers",), note="LlamaRMSNorm"),
        "compile": compiled(formula),
        "torch": Provider(build_torch, note="F.rms_norm"),
        "liger": liger_kernel(build_liger, overwrites=True, note=IN_PLACE),
        "liger-cutedsl": liger_kernel(build_liger, cutedsl=True, overwrites=True, note=IN_PLACE),
    },
    tiny=Case(rows=4, hidden=64),
    bars=[Case(rows=8192, hidden=4096), Case(rows=16384, hidden=8192)],
    sweeps=[
        Sweep(
            "hidden",
            "RMSNorm, 8192 rows, bf16",
            "hidden",
            "hidden size",
            [Case(rows=8192, hidden=hidden) for hidden in (1024, 2048, 4096, 8192, 16384)],
        ),
        Sweep(
            "sequence_fp32",
            "RMSNorm, batch 4, hidden size 2048, fp32",
            "sequence",
            "sequence length",
            [Case("float32", batch=4, sequence=sequence, hidden=2048) for sequence in (256, 512, 1024)],
        ),
    ],
    floor_bytes=floor_bytes,
)

if __name__ == "__main__":
    main(BENCHMARK)
