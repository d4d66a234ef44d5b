"""A head with a LoRA adapter and its cross entropy, forward and backward: ``python benchmarks/adapted_head.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.heads import head_products, products_ms
from harness.peers import compiled, upcast
from harness.run import main

IGNORED = -100


def formula(hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    """As peft's layer makes the logits (the scale is in ``a`` here), and as transformers' models make their loss."""
    return F.cross_entropy(upcast(F.linear(hidden, weight) + F.linear(F.linear(hidden, a), b)), labels)


def n_valid(case: Case) -> int:
    return case.rows - int(case.rows * case.sizes.get("ignored", 0))


def build_ours(case: Case) -> Op:
    from liger_trainer.kernels import linear_cross_entropy

    def op(hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        low_rank = (F.linear(hidden, a), b)
        return linear_cross_entropy(hidden, weight, labels, low_rank=low_rank, max_valid=n_valid(case))

    return op


def build_stacked(case: Case) -> Op:
    from liger_trainer.kernels import linear_cross_entropy

    def op(hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        columns = torch.cat([hidden, F.linear(hidden, a)], 1)
        return linear_cross_entropy(columns, torch.cat([weight, b], 1), labels, max_valid=n_valid(case))

    return op


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    hidden = randn(generator, case, case.rows, case.hidden)
    weight = randn(generator, case, case.vocab, case.hidden, scale=case.hidden**-0.5, grad=False)
    a = randn(generator, case, case.rank, case.hidden, scale=case.hidden**-0.5)
    b = randn(generator, case, case.vocab, case.rank, scale=0.3 * case.rank**-0.5)
    labels = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
    labels[torch.randperm(case.rows, generator=generator, device=device)[n_valid(case) :]] = IGNORED
    return Inputs((hidden, weight, a, b, labels))


def floor_ms(case: Case, device: torch.device, budget_ms: float) -> float:
    """The two products with the frozen weight, in one tile, on the rows that have a label."""
    hidden, weight, *_ = (each.detach() for each in BENCHMARK.inputs(case, device).args)
    return products_ms(
        head_products(hidden[: n_valid(case)], weight, trained=False), device=device, budget_ms=budget_ms
    )


LLAMA_3 = {"rows": 8192, "hidden": 4096, "vocab": 128256}
BENCHMARK = Benchmark(
    name="adapted_head",
    title="LM head with a LoRA adapter, and cross entropy",
    about=(
        "Floor: the two bare products with the frozen weight, on the rows that have a label, in one tile. The products "
        "of the adapter's rank are not in it."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours, note="low_rank=(a, b)"),
        "ours-stacked": Provider(build_stacked, note="[W, B] as one weight, copied in each step"),
        "hf": Provider(lambda case: formula, note="peft's layer, then F.cross_entropy in fp32"),
        "compile": compiled(formula),
    },
    tiny=Case(rows=128, hidden=128, vocab=1024, rank=8),
    bars=[Case(**LLAMA_3, rank=16), Case(**LLAMA_3, rank=16, ignored=0.5), Case(**LLAMA_3, rank=64)],
    sweeps=[
        Sweep(
            "rank",
            "LM head with an adapter, 8192 rows, hidden size 4096, vocabulary 128256, bf16",
            "rank",
            "rank",
            [Case(**LLAMA_3, rank=rank) for rank in (8, 16, 64, 256)],
            ("ours", "ours-stacked"),
        )
    ],
    floor_ms=floor_ms,
    device_graphs=False,
)

if __name__ == "__main__":
    main(BENCHMARK)
