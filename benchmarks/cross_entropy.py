"""Cross entropy over given logits, forward and backward: ``python benchmarks/cross_entropy.py --help``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.peers import compiled, liger_kernel, upcast
from harness.run import main


def formula(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers' loss function, which computes in fp32."""
    return F.cross_entropy(upcast(logits), labels)


def build_ours(case: Case) -> Op:
    from liger_trainer.kernels import cross_entropy

    return cross_entropy


def build_liger(case: Case) -> Op:
    from liger_kernel.ops import LigerCrossEntropyFunction

    return lambda logits, labels: LigerCrossEntropyFunction.apply(logits, labels, None)[0]


def build_trl(case: Case) -> Op:
    from trl.kernels import selective_log_softmax_and_entropy

    def op(logits: Tensor, labels: Tensor) -> Tensor:
        log_probs, _ = selective_log_softmax_and_entropy(logits[None], labels[None])
        return -log_probs.mean()

    return op


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    labels = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
    return Inputs((randn(generator, case, case.rows, case.vocab), labels))


IN_PLACE = "writes the gradient over the logits"
BENCHMARK = Benchmark(
    name="cross_entropy",
    title="Cross entropy",
    about=(
        "Floor: a copy of the logits, the logits again and their gradient. Who overwrites the logits gets them back "
        "before each timed call, outside of its time, and allocates nothing."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours),
        "hf": Provider(lambda case: formula, note="F.cross_entropy in fp32"),
        "compile": compiled(formula),
        "torch": Provider(lambda case: F.cross_entropy, note="F.cross_entropy in the logits' dtype"),
        "liger": liger_kernel(build_liger, overwrites=True, note=IN_PLACE),
        "liger-cutedsl": liger_kernel(build_liger, cutedsl=True, overwrites=True, note=IN_PLACE),
        "trl": Provider(build_trl, ("trl", "triton"), note="computes the entropy as well"),
    },
    tiny=Case(rows=4, vocab=512),
    bars=[Case(rows=8192, vocab=128256)],
    sweeps=[
        Sweep(
            "vocab",
            "Cross entropy, 8192 rows, bf16",
            "vocab",
            "vocabulary",
            [Case(rows=8192, vocab=vocab) for vocab in (16032, 32064, 64128, 128256)],
        )
    ],
    floor_bytes=lambda case: 3 * case.rows * case.vocab * case.torch_dtype.itemsize,
)

if __name__ == "__main__":
    main(BENCHMARK)
