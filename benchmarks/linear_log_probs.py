"""Log-probabilities behind a language-model head, forward and backward: ``python benchmarks/linear_log_probs.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.heads import head_products, products_ms
from harness.peers import compiled, upcast
from harness.run import main

IGNORED = -100
EXTRAS = ("entropy", "mean_logits", "top1")  # what TRL's trainers log


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs = upcast(F.linear(hidden, weight)).log_softmax(-1)
    return log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != IGNORED)


def n_valid(case: Case) -> int:
    return case.rows - int(case.rows * case.sizes.get("ignored", 0))


def build_ours(cache_bytes: int | None = None, least_memory: bool = False):
    def build(case: Case) -> Op:
        from liger_trainer.kernels import linear_log_probs

        outputs = EXTRAS if "extras" in case.sizes else ()
        options = {"max_valid": n_valid(case), "outputs": outputs}
        options |= {"cache_bytes": cache_bytes, "least_memory": least_memory}

        def op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            scored = linear_log_probs(hidden, weight, labels, **options)
            return scored if isinstance(scored, Tensor) else scored.log_probs

        return op

    return build


def build_trl(case: Case) -> Op:
    from trl.kernels import ChunkedLogProbFunction

    chunk_size = 32768  # as trl.trainer.utils.add_fused_lm_head calls it
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1") if "extras" in case.sizes else ("log_probs",)

    def op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        mask = labels != IGNORED
        log_probs = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, labels[mask], 1.0, chunk_size, None, 1.0, outputs
        )[0]
        return log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs)

    return op


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    hidden = randn(generator, case, case.rows, case.hidden)
    weight = randn(generator, case, case.vocab, case.hidden, scale=case.hidden**-0.5, grad=False)
    labels = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
    labels[torch.randperm(case.rows, generator=generator, device=device)[n_valid(case) :]] = IGNORED
    upstream = torch.randn(case.rows, generator=generator, device=device)
    return Inputs((hidden, weight.requires_grad_("frozen" not in case.sizes), labels), (upstream,))


def floor_ms(case: Case, device: torch.device, budget_ms: float) -> float:
    """The matrix products alone, in one tile, on the rows that have a label, none of them twice."""
    hidden, weight, _ = (each.detach() for each in BENCHMARK.inputs(case, device).args)
    products = head_products(hidden[: n_valid(case)], weight, trained="frozen" not in case.sizes)
    return products_ms(products, device=device, budget_ms=budget_ms)


LLAMA_3 = {"rows": 8192, "hidden": 4096, "vocab": 128256}
BENCHMARK = Benchmark(
    name="linear_log_probs",
    title="LM head and log-probabilities",
    about=(
        "Floor: the bare matrix products on the rows that have a label, in one tile, each once, with the weight's "
        "gradient in fp32 where the head is trained. The peak includes the gradients. With `extras`, entropy, mean "
        "logit and top-1 come along, as TRL's trainers log them; gradients flow into the log-probabilities."
    ),
    make_inputs=make_inputs,
    reference=formula,
    providers={
        "ours": Provider(build_ours(), note="keeps the logits that it chooses"),
        "ours-keep-2g": Provider(build_ours(2 * 2**30 + 2**27), note="keeps 2.1 GiB of logits"),
        "ours-keep-512m": Provider(build_ours(512 * 2**20), note="keeps 512 MiB of logits"),
        "ours-keep-0": Provider(build_ours(0), note="recomputes every logit"),
        "ours-least": Provider(build_ours(least_memory=True), note="least_memory=True"),
        "hf": Provider(lambda case: formula, note="F.linear, then log_softmax in fp32"),
        "compile": compiled(formula),
        "trl": Provider(build_trl, ("trl",), note="ChunkedLogProbFunction, recomputes every logit"),
    },
    tiny=Case(rows=128, hidden=128, vocab=1024),
    bars=[
        Case(**LLAMA_3),
        Case(**LLAMA_3, extras=True),
        Case(**LLAMA_3, ignored=0.5),
        Case(**LLAMA_3, frozen=True),
    ],
    sweeps=[
        Sweep(
            "rows",
            "LM head and log-probabilities, hidden size 4096, vocabulary 128256, bf16",
            "rows",
            "rows",
            [Case(rows=rows, hidden=4096, vocab=128256) for rows in (2048, 4096, 8192, 16384)],
            ("ours", "ours-keep-512m", "ours-keep-0", "trl", "hf"),
        )
    ],
    floor_ms=floor_ms,
    device_graphs=False,
)

if __name__ == "__main__":
    main(BENCHMARK)
