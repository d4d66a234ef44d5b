"""Divergence between two language-model heads, forward and backward: ``python benchmarks/linear_jsd.py --help``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.heads import head_products, products_ms
from harness.peers import compiled, liger_kernel, upcast
from harness.run import main


def formula(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """As TRL's GKDTrainer, with beta 0.5."""
    s = upcast(F.linear(student, student_weight)).log_softmax(-1)
    t = upcast(F.linear(teacher, teacher_weight)).log_softmax(-1)
    m = torch.logaddexp(s, t) - math.log(2)
    both = [F.kl_div(m, each, reduction="sum", log_target=True) for each in (s, t)]
    return (both[0] + both[1]) / (2 * len(student))


def build_ours(tile_bytes: int | None = None):
    def build(case: Case) -> Op:
        from liger_trainer.kernels import linear_jsd

        return lambda *tensors: linear_jsd(*tensors, tile_bytes=tile_bytes)

    return build


def build_trl(case: Case) -> Op:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def op(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(student, student_weight, None, teacher, teacher_weight, None, 0.5)[
            0
        ].mean()

    return op


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    def op(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return LigerFusedLinearJSDFunction.apply(student, student_weight, teacher, teacher_weight, None, 0.5, -100, 1.0)

    return op


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    tensors = []
    for hidden in (case.hidden, case.teacher_hidden):
        grad = not tensors
        tensors.append(randn(generator, case, case.rows, hidden, grad=grad))
        tensors.append(randn(generator, case, case.vocab, hidden, scale=hidden**-0.5, grad=False).requires_grad_(grad))
    return Inputs(tuple(tensors))


def floor_ms(case: Case, device: torch.device, budget_ms: float) -> float:
    """The four matrix products alone, in one tile; the weight's gradient in fp32."""
    student, student_weight, teacher, teacher_weight = (each.detach() for each in BENCHMARK.inputs(case, device).args)
    logits = teacher.new_empty(case.rows, case.vocab)
    return products_ms(
        head_products(student, student_weight),
        lambda: torch.mm(teacher, teacher_weight.t(), out=logits),
        device=device,
        budget_ms=budget_ms,
    )


BENCHMARK = Benchmark(
    name="linear_jsd",
    title="Two LM heads and their divergence",
    about=(
        "Floor: the four bare matrix products, one of the teacher and three of the student, in one tile, with the "
        "weight's gradient in fp32. The peak includes the gradients. Beta is 0.5, and every row counts."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours(), note="tiles as it chooses them"),
        "ours-256m": Provider(build_ours(256 * 2**20), note="256 MiB for both tiles"),
        "ours-1g": Provider(build_ours(2**30), note="1 GiB for both tiles"),
        "hf": Provider(lambda case: formula, note="logits of both, then as GKDTrainer"),
        "compile": compiled(formula),
        "trl": Provider(build_trl, ("trl",), note="ChunkedDivergenceFunction, recomputes every logit"),
        "liger": liger_kernel(build_liger),
    },
    tiny=Case(rows=128, hidden=96, teacher_hidden=128, vocab=1024),
    bars=[Case(rows=4096, hidden=2048, teacher_hidden=4096, vocab=128256)],
    sweeps=[
        Sweep(
            "rows",
            "Two LM heads and their divergence, hidden sizes 2048 and 4096, vocabulary 128256, bf16",
            "rows",
            "rows",
            [Case(rows=rows, hidden=2048, teacher_hidden=4096, vocab=128256) for rows in (1024, 2048, 4096, 8192)],
            ("ours", "trl", "liger", "hf"),
        )
    ],
    floor_ms=floor_ms,
    device_graphs=False,
)

if __name__ == "__main__":
    main(BENCHMARK)
