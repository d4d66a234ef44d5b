"""Language-model head and cross entropy, forward and backward: ``python benchmarks/linear_cross_entropy.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, UnavailableError, randn
from harness.heads import head_products, products_ms
from harness.peers import compiled, liger_kernel, upcast
from harness.run import main

IGNORED = -100


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models and their loss function, which computes in fp32."""
    return F.cross_entropy(upcast(F.linear(hidden, weight)), labels)


def n_valid(case: Case) -> int:
    return case.rows - int(case.rows * case.sizes.get("ignored", 0))


def build_ours(tile_bytes: int | None = None):
    def build(case: Case) -> Op:
        from liger_trainer.kernels import linear_cross_entropy

        # As a patched model calls it, which counts the labels long before.
        options = {"max_valid": n_valid(case), "tile_bytes": tile_bytes}
        return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options)

    return build


def build_torch(case: Case) -> Op:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def build_liger(accum_dtype: torch.dtype | None = None):
    def build(case: Case) -> Op:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        options = (None, None, IGNORED, 0.0, 0.0, "mean", None, False, accum_dtype)

        def op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *options)[0]

        return op

    return build


def build_trl(case: Case) -> Op:
    from trl.kernels import ChunkedLogProbFunction

    chunk_size = 32768  # as trl.trainer.utils.add_fused_lm_head calls it

    def op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        mask = labels != IGNORED
        log_probs = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, labels[mask], 1.0, chunk_size, None, 1.0, ("log_probs",)
        )[0]
        return -log_probs.sum() / mask.sum().clamp(min=1)

    return op


def build_cce(filter_eps: str | None):
    def build(case: Case) -> Op:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, filter_eps=filter_eps)

    return build


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    hidden = randn(generator, case, case.rows, case.hidden)
    trained = "frozen" not in case.sizes
    weight = randn(generator, case, case.vocab, case.hidden, scale=case.hidden**-0.5, grad=False).requires_grad_(
        trained
    )
    labels = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
    labels[torch.randperm(case.rows, generator=generator, device=device)[n_valid(case) :]] = IGNORED
    return Inputs((hidden, weight, labels))


def floor_ms(case: Case, device: torch.device, budget_ms: float) -> float:
    """The matrix products alone, in one tile, on the rows that have a label; the weight's gradient in fp32."""
    hidden, weight, _ = (each.detach() for each in BENCHMARK.inputs(case, device).args)
    hidden = hidden[: n_valid(case)]
    products = head_products(hidden, weight, trained="frozen" not in case.sizes)
    return products_ms(products, device=device, budget_ms=budget_ms)


LLAMA_3 = {"rows": 8192, "hidden": 4096, "vocab": 128256}
TILED = ("ours", "liger", "liger-fp32", "trl", "cce", "hf", "torch")
BENCHMARK = Benchmark(
    name="linear_cross_entropy",
    title="LM head and cross entropy",
    about=(
        "Floor: the bare matrix products on the rows that have a label, in one tile, with the weight's gradient in "
        "fp32 where the head is trained. The peak includes the gradients. The number of labels is given to ours, as a "
        "patched model gives it; the peers count them themselves. Calls take tens of milliseconds: their event time is "
        "device time."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours(), note="tiles as it chooses them"),
        "ours-512m": Provider(build_ours(512 * 2**20), note="tiles of 512 MiB"),
        "ours-2g": Provider(build_ours(2**31), note="tiles of 2 GiB"),
        "hf": Provider(lambda case: formula, note="F.linear, then F.cross_entropy in fp32"),
        "compile": compiled(formula),
        "torch": Provider(build_torch, note="F.linear_cross_entropy, chunked"),
        "liger": liger_kernel(build_liger(), note="weight's gradient accumulates in bf16"),
        "liger-fp32": liger_kernel(build_liger(torch.float32), note="accum_dtype=torch.float32"),
        "liger-cutedsl": liger_kernel(build_liger(), cutedsl=True),
        "trl": Provider(build_trl, ("trl",), note="ChunkedLogProbFunction"),
        "cce": Provider(build_cce("high"), ("cut_cross_entropy",), note="leaves out gradients below 2^-12"),
        "cce-exact": Provider(build_cce(None), ("cut_cross_entropy",), note="filter_eps=None"),
    },
    tiny=Case(rows=128, hidden=128, vocab=1024),
    bars=[
        Case(**LLAMA_3),
        Case(**LLAMA_3, ignored=0.5),
        Case(**LLAMA_3, frozen=True),
        Case(rows=16384, hidden=2048, vocab=151936),
        Case(rows=4096, hidden=4096, vocab=32000),
    ],
    sweeps=[
        Sweep(
            "vocab",
            "LM head and cross entropy, 8192 rows, hidden size 4096, bf16",
            "vocab",
            "vocabulary",
            [Case(rows=8192, hidden=4096, vocab=vocab) for vocab in (16032, 32064, 64128, 128256)],
            TILED,
        )
    ],
    floor_ms=floor_ms,
    device_graphs=False,
)

if __name__ == "__main__":
    main(BENCHMARK)
