"""Preference losses behind a language-model head, forward and backward: ``python benchmarks/preference_losses.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.benchmark import Benchmark, Case, Inputs, Op, Provider, Sweep, randn
from harness.heads import head_products, products_ms
from harness.peers import liger_kernel, upcast
from harness.run import main

IGNORED = -100
LOSSES = ("dpo", "orpo", "cpo", "simpo", "kto")
AVERAGING = ("orpo", "simpo")
REFERENCED = ("dpo", "kto")
TITLES = {"dpo": "DPO", "orpo": "ORPO", "cpo": "CPO", "simpo": "SimPO", "kto": "KTO"}
# The paper's, and with CPO and ORPO the chosen answers' likelihood.
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"use_ref_model": True},
    "orpo": {},
    "cpo": {},
    "simpo": {"compute_nll_loss": False},
    "kto": {"use_ref_model": True},
}

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, labels) to (B, T) log-probabilities


def desirable(labels: Tensor) -> Tensor:
    return torch.arange(len(labels), device=labels.device) % 2 == 0


def loss_of(name: str, score: Scores, hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> Tensor:
    """A loss from anyone's log-probabilities, in the formulas of its paper."""
    from liger_trainer import alignment_losses as losses

    tokens = score(hidden, weight, labels)
    mask = labels != IGNORED
    sums = tokens.sum(-1) / (mask.sum(-1) if name in AVERAGING else 1)
    ref = None
    if reference:
        with torch.no_grad():
            ref = score(*reference, labels).sum(-1)
    if name == "kto":
        return losses.kto_loss(sums, ref, desirable(labels)).mean()
    chosen, rejected = sums.chunk(2)
    likelihood = -tokens.chunk(2)[0].sum() / mask.chunk(2)[0].sum()
    if name == "dpo":
        assert ref is not None
        return losses.dpo_loss(chosen, rejected, *ref.chunk(2)).mean()
    if name == "orpo":
        return losses.orpo_loss(chosen, rejected).mean() + likelihood
    if name == "cpo":
        return losses.cpo_loss(chosen, rejected).mean() + likelihood
    return losses.simpo_loss(chosen, rejected, beta=0.1).mean()


def score_eagerly(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs = upcast(F.linear(hidden, weight)).log_softmax(-1)
    return log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != IGNORED)


def score_as_trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    mask = labels != IGNORED
    log_probs = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ("log_probs",)
    )[0]
    return log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs)


def build_scored(name: str, score: Scores) -> Callable[[Case], Op]:
    return lambda case: lambda *tensors: loss_of(name, score, *tensors)


def call_module(name: str, module: Any) -> Op:
    """A module of Liger-Kernel's interface, ours or theirs."""

    def op(hidden: Tensor, weight: Tensor, labels: Tensor, *reference: Tensor) -> Tensor:
        if name == "kto":
            arguments: tuple[Any, ...] = (hidden, weight, labels, None, desirable(labels))
        else:
            arguments = (weight, hidden, labels) + ((None,) if reference else ())
        result = module(*arguments, *reference)
        return result[0] if isinstance(result, tuple) else result

    return op


def build_ours(name: str, **options: Any) -> Callable[[Case], Op]:
    def build(case: Case) -> Op:
        from liger_trainer import alignment_losses

        module = getattr(alignment_losses, f"LigerFusedLinear{TITLES[name]}Loss")
        return call_module(name, module(**OPTIONS[name], **options))

    return build


def build_liger(name: str) -> Callable[[Case], Op]:
    def build(case: Case) -> Op:
        from liger_kernel import chunked_loss

        return call_module(name, getattr(chunked_loss, f"LigerFusedLinear{TITLES[name]}Loss")(**OPTIONS[name]))

    return build


def n_answers(case: Case) -> int:
    return case.answers if "answers" in case.sizes else 2 * case.pairs


def make_inputs(name: str) -> Callable[[Case, torch.device, torch.Generator], Inputs]:
    def make(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
        shape = n_answers(case), case.length, case.hidden
        tensors = []
        for trained in (True, False)[: 1 + (name in REFERENCED)]:
            tensors.append(randn(generator, case, *shape, grad=trained))
            weight = randn(generator, case, case.vocab, case.hidden, scale=case.hidden**-0.5, grad=False)
            tensors.append(weight.requires_grad_(trained and "frozen" not in case.sizes))
        labels = torch.randint(case.vocab, shape[:2], generator=generator, device=device)
        labels[:, : int(case.length * case.sizes.get("prompt", 0))] = IGNORED
        return Inputs((*tensors[:2], labels, *tensors[2:]))

    return make


def floor_ms(name: str) -> Callable[[Case, torch.device, float], float]:
    def measure(case: Case, device: torch.device, budget_ms: float) -> float:
        """The products of policy and reference alone, in one tile, on the labelled rows."""
        hidden, weight, labels, *reference = (
            each.detach() for each in make_inputs(name)(case, device, torch.Generator(device).manual_seed(0)).args
        )
        rows = int((labels != IGNORED).sum())
        parts = [head_products(hidden.flatten(0, 1)[:rows], weight, trained="frozen" not in case.sizes)]
        if reference:
            x, logits = reference[0].flatten(0, 1)[:rows], hidden.new_empty(rows, case.vocab)
            parts.append(lambda: torch.mm(x, reference[1].t(), out=logits))
        return products_ms(*parts, device=device, budget_ms=budget_ms)

    return measure


HEAD = {"hidden": 4096, "vocab": 128256}


def bars(name: str) -> list[Case]:
    if name == "kto":
        return [Case(answers=8, length=1024, **HEAD)]
    plain = Case(pairs=4, length=1024, **HEAD)
    if name != "dpo":
        return [plain]
    return [
        plain,
        Case(pairs=4, length=1024, prompt=0.5, **HEAD),
        Case(pairs=4, length=1024, frozen=True, **HEAD),
        Case(pairs=1, length=16384, **HEAD),
    ]


def benchmark(name: str) -> Benchmark:
    title = TITLES[name]
    size = {"answers": 2} if name == "kto" else {"pairs": 1}
    return Benchmark(
        name=f"{name}_loss",
        title=f"LM head and {title}",
        about=(
            "Floor: the bare matrix products on the labelled rows, in one tile, each once, the reference's among them, "
            "with the weight's gradient in fp32 where the head is trained. The peak includes the gradients."
        ),
        make_inputs=make_inputs(name),
        reference=build_scored(name, score_eagerly)(Case()),
        providers={
            "ours": Provider(build_ours(name), note="keeps the logits that it chooses"),
            "ours-keep-512m": Provider(build_ours(name, cache_bytes=512 * 2**20), note="keeps 512 MiB of logits"),
            "ours-keep-0": Provider(
                build_ours(name, cache_bytes=0, tile_bytes=256 * 2**20), note="keeps none, in tiles of 256 MiB"
            ),
            "ours-least": Provider(build_ours(name, least_memory=True), note="least_memory=True"),
            "ours-least-1g": Provider(
                build_ours(name, least_memory=True, cache_bytes=2**30), note="least_memory=True, keeps 1 GiB of logits"
            ),
            "hf": Provider(build_scored(name, score_eagerly), note="F.linear, then log_softmax in fp32"),
            "trl": Provider(build_scored(name, score_as_trl), ("trl",), note="its fused head, under the same formula"),
            "liger": liger_kernel(build_liger(name), note=f"LigerFusedLinear{title}Loss"),
        },
        tiny=Case(**size, length=64, hidden=96, vocab=1024),
        bars=bars(name),
        sweeps=[
            Sweep(
                "length",
                f"LM head and {title}, hidden size 4096, vocabulary 128256, bf16",
                "length",
                "tokens an answer",
                [Case(**size, length=length, **HEAD) for length in (1024, 2048, 4096, 8192)],
            )
        ],
        floor_ms=floor_ms(name),
        plain="hf",
        device_graphs=False,
    )


BENCHMARKS = tuple(benchmark(name) for name in LOSSES)

if __name__ == "__main__":
    main(*BENCHMARKS)
