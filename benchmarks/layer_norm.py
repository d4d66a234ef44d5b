"""LayerNorm, forward and backward: ``python benchmarks/layer_norm.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.peers import compiled, liger_kernel
from harness.run import main

EPS = 1e-5


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def build_ours(case: Case) -> Op:
    from liger_trainer.kernels import layer_norm

    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS)


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    x, grad = (randn(generator, case, case.rows, case.hidden, grad=each) for each in (True, False))
    weight = randn(generator, case, case.hidden, scale=0.1, grad=False).add_(1).requires_grad_()
    return Inputs((x, weight, randn(generator, case, case.hidden, scale=0.1)), (grad,))


BENCHMARK = Benchmark(
    name="layer_norm",
    title="LayerNorm",
    about="Hugging Face's models call F.layer_norm. Floor: a copy of x, y, dy, x again and dx.",
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours),
        "torch": Provider(lambda case: formula, note="F.layer_norm"),
        "compile": compiled(formula),
        "liger": liger_kernel(build_liger),
    },
    tiny=Case(rows=4, hidden=64),
    bars=[Case(rows=8192, hidden=4096)],
    sweeps=[
        Sweep(
            "hidden",
            "LayerNorm, 8192 rows, bf16",
            "hidden",
            "hidden size",
            [Case(rows=8192, hidden=hidden) for hidden in (1024, 2048, 4096, 8192)],
        )
    ],
    floor_bytes=lambda case: 5 * case.rows * case.hidden * case.torch_dtype.itemsize,
)

if __name__ == "__main__":
    main(BENCHMARK)
