"""Residual addition and RMSNorm, forward and backward: ``python benchmarks/add_rms_norm.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor

import rms_norm
from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, UnavailableError, randn
from harness.peers import compiled, liger_kernel
from harness.run import main


def formula(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm.formula(total, weight), total


def build_ours(case: Case) -> Op:
    try:
        from liger_trainer.kernels import add_rms_norm
    except ImportError:
        raise UnavailableError("liger_trainer.kernels has no add_rms_norm") from None
    return lambda x, residual, weight: add_rms_norm(x, residual, weight, rms_norm.EPS)


def build_module(case: Case) -> Op:
    norm = rms_norm.build_module(case)

    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    return op


def build_torch(case: Case) -> Op:
    norm = rms_norm.build_torch(case)

    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    return op


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    options = (rms_norm.EPS, 0.0, "llama", False)
    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, *options)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    norm = rms_norm.make_inputs(case, device, generator)
    x, weight = norm.args
    residual, dtotal = (randn(generator, case, case.rows, case.hidden, grad=each) for each in (True, False))
    return Inputs((x, residual, weight), (*norm.grad_outputs, dtotal))


BENCHMARK = Benchmark(
    name="add_rms_norm",
    title="Residual addition and RMSNorm",
    about=(
        "Outputs are the norm and the sum, both with a gradient. Floor: a copy of x, residual, y, sum, dy, dsum, sum "
        "again and the one gradient of both inputs."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours),
        "hf": Provider(build_module, requires=("transformers",), note="+, then LlamaRMSNorm"),
        "compile": compiled(formula),
        "torch": Provider(build_torch, note="+, then F.rms_norm"),
        "liger": liger_kernel(build_liger, note="LigerFusedAddRMSNormFunction, in_place=False"),
    },
    tiny=rms_norm.BENCHMARK.tiny,
    bars=[Case(rows=8192, hidden=4096)],
    sweeps=[
        Sweep(
            "hidden",
            "Residual addition and RMSNorm, 8192 rows, bf16",
            "hidden",
            "hidden size",
            [Case(rows=8192, hidden=hidden) for hidden in (1024, 2048, 4096, 8192)],
        )
    ],
    floor_bytes=lambda case: 8 * case.rows * case.hidden * case.torch_dtype.itemsize,
)

if __name__ == "__main__":
    main(BENCHMARK)
