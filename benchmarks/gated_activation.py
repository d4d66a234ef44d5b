"""SwiGLU and GEGLU without projections, forward and backward: ``python benchmarks/gated_activation.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.peers import compiled, liger_kernel
from harness.run import main


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def build_ours(name: str):
    def build(case: Case) -> Op:
        from liger_trainer import kernels

        return getattr(kernels, name)

    return build


def build_liger(function: str):
    def build(case: Case) -> Op:
        from liger_kernel import ops

        return getattr(ops, function).apply

    return build


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    gate, up, grad = (randn(generator, case, case.rows, case.intermediate, grad=each) for each in (True, True, False))
    return Inputs((gate, up), (grad,))


def benchmark(name: str, title: str, formula: Op, liger_function: str, cutedsl: bool) -> Benchmark:
    build_peer = build_liger(liger_function)
    note = "writes its inputs' gradients over its inputs"
    providers = {
        "ours": Provider(build_ours(name)),
        "hf": Provider(lambda case: formula, note="as the MLPs of transformers compute it"),
        "compile": compiled(formula),
        "liger": liger_kernel(build_peer, overwrites=True, note=note),
    }
    if cutedsl:
        providers["liger-cutedsl"] = liger_kernel(build_peer, cutedsl=True, overwrites=True, note=note)
    return Benchmark(
        name=name,
        title=title,
        about="Floor: a copy of gate, up, the result, its gradient, gate and up again, and their gradients.",
        make_inputs=make_inputs,
        reference=formula,
        providers=providers,
        tiny=Case(rows=4, intermediate=64),
        bars=[Case(rows=8192, intermediate=14336)],
        sweeps=[
            Sweep(
                "intermediate",
                f"{title}, 8192 rows, bf16",
                "intermediate",
                "intermediate size",
                [Case(rows=8192, intermediate=size) for size in (3584, 7168, 14336, 28672)],
            )
        ],
        floor_bytes=lambda case: 8 * case.rows * case.intermediate * case.torch_dtype.itemsize,
    )


BENCHMARKS = (
    benchmark("swiglu", "SwiGLU", swiglu, "LigerSiLUMulFunction", cutedsl=True),
    benchmark("geglu", "GEGLU (tanh)", geglu, "LigerGELUMulFunction", cutedsl=False),
)

if __name__ == "__main__":
    main(*BENCHMARKS)
