"""Error of the gradients of LM head and cross entropy against float64, alone and accumulated over micro-batches.

    python benchmarks/gradient_accuracy.py

The rows are cut into micro-batches whose gradients PyTorch accumulates in ``weight.grad``, as a training loop does. Two
reference lines: one product of the exact logits' gradient with fp32 accumulation, rounded once, which no
implementation on matrix products in the inputs' dtype can better; and the exact gradients of the micro-batches, summed
in the weight's dtype, which is what accumulating in that dtype costs whatever the kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import linear_cross_entropy
from harness.benchmark import Case, Op, Provider, UnavailableError
from harness.measure import current_device, free_memory
from harness.record import Record
from harness.run import RESULTS, relative_error, show_table

NAME = "gradient_accuracy"
SHAPE = {"rows": 8192, "hidden": 1024, "vocab": 128256}
MICRO_BATCHES = (1, 8, 32)
# Standard deviation of the logits: peaked as a model's in training, not flat as a fresh one's.
LOGIT_STD = 2.0
SLICE = 1024  # rows that are in float64 at a time

PROVIDERS = {
    name: linear_cross_entropy.BENCHMARK.providers[name]
    for name in ("ours", "hf", "torch", "liger", "liger-fp32", "trl", "cce", "cce-exact")
}
# Beside its plain row, with param.grad_dtype = torch.float32.
WITH_FP32_GRAD = ("ours", "hf", "liger-fp32")
ONE_PRODUCT, EXACT_SUM = "one product", "exact, summed"


class Problem:
    """Hidden states, weight and labels, and the exact gradients of the mean loss."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        inputs = linear_cross_entropy.make_inputs(case, device, generator)
        self.case = case
        self.hidden, self.weight, self.labels = (each.detach() for each in inputs.args)
        self.weight.mul_(LOGIT_STD)
        self.d_weight = torch.zeros(self.weight.shape, dtype=torch.float64, device=device)
        self.d_hidden = torch.zeros(self.hidden.shape, dtype=torch.float64, device=device)
        weight = self.weight.double()
        for rows in self.slices(case.rows):
            d_logits = self.d_logits(rows, weight)
            self.d_hidden[rows] = d_logits @ weight
            self.d_weight.addmm_(d_logits.t(), self.hidden[rows].double())

    def slices(self, rows: int) -> Iterator[slice]:
        """Slices of at most ``SLICE`` rows that no multiple of ``rows`` rows cuts."""
        step = min(SLICE, rows)
        return (slice(start, start + step) for start in range(0, self.case.rows, step))

    def d_logits(self, rows: slice, weight: Tensor) -> Tensor:
        """The exact gradient of the mean loss with respect to the logits of these rows, float64."""
        d_logits = (self.hidden[rows].double() @ weight.t()).softmax(-1)
        labels = self.labels[rows]
        d_logits[torch.arange(len(labels), device=labels.device), labels] -= 1
        return d_logits.div_(self.case.rows)

    def errors(self, d_hidden: Tensor, d_weight: Tensor) -> dict[str, float]:
        """Relative errors in the Frobenius norm."""
        return {
            "d_hidden": relative_error(d_hidden, self.d_hidden),
            "d_weight": relative_error(d_weight, self.d_weight),
        }

    def of_provider(self, op: Op, micro_batches: int, grad_dtype: torch.dtype | None) -> dict[str, float]:
        weight = self.weight.clone().requires_grad_()
        if grad_dtype is not None:
            weight.grad_dtype = grad_dtype
        d_hidden = []
        for hidden, labels in zip(self.hidden.chunk(micro_batches), self.labels.chunk(micro_batches), strict=True):
            hidden = hidden.clone().requires_grad_()
            (op(hidden, weight, labels) / micro_batches).backward()
            d_hidden.append(hidden.grad)
        return self.errors(torch.cat(d_hidden), weight.grad)

    def of_one_product(self) -> dict[str, float]:
        """The exact gradient of the logits, rounded to be a product's operand, and products rounded once."""
        weight = self.weight.double()
        d_logits = torch.empty(self.case.rows, self.case.vocab, dtype=self.weight.dtype, device=self.weight.device)
        for rows in self.slices(self.case.rows):
            d_logits[rows] = self.d_logits(rows, weight)
        del weight
        return self.errors(torch.mm(d_logits, self.weight), torch.mm(d_logits.t(), self.hidden))

    def of_exact_sum(self, micro_batches: int) -> dict[str, float]:
        """The exact gradients of the micro-batches, each rounded to the weight's dtype, summed in it."""
        weight = self.weight.double()
        per_micro_batch = self.case.rows // micro_batches
        total = torch.zeros_like(self.weight)
        exact = torch.zeros_like(self.d_weight)
        for rows in self.slices(per_micro_batch):
            exact.addmm_(self.d_logits(rows, weight).t(), self.hidden[rows].double())
            if rows.stop % per_micro_batch == 0:
                total += exact.to(total.dtype)
                exact.zero_()
        return self.errors(self.d_hidden.to(self.hidden.dtype), total)


def measurements(problem: Problem) -> Iterator[tuple[str, int, Callable[[], dict[str, float]]]]:
    """Provider, micro-batches and what computes their errors."""
    yield ONE_PRODUCT, 1, problem.of_one_product
    for micro_batches in MICRO_BATCHES:
        yield EXACT_SUM, micro_batches, lambda m=micro_batches: problem.of_exact_sum(m)
        case = Case(problem.case.dtype, **(problem.case.sizes | {"rows": problem.case.rows // micro_batches}))
        for name, provider in PROVIDERS.items():

            def of_provider(
                provider: Provider = provider,
                case: Case = case,
                m: int = micro_batches,
                grad_dtype: torch.dtype | None = None,
            ) -> dict[str, float]:
                provider.check_requirements()
                return problem.of_provider(provider.build(case), m, grad_dtype)

            yield name, micro_batches, of_provider
            if name in WITH_FP32_GRAD and hasattr(Tensor, "grad_dtype"):
                yield f"{name}, fp32 grad", micro_batches, lambda f=of_provider: f(grad_dtype=torch.float32)


def measure(compute: Callable[[], dict[str, float]], device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"d_hidden": None, "d_weight": None, "error": None}
    try:
        found |= compute()
    except UnavailableError as error:
        found["error"] = str(error)
    except torch.OutOfMemoryError:
        found["error"] = "out of memory"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    free_memory(device)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--device", type=torch.device, default=current_device(), help="torch's accelerator by default")
    parser.add_argument("--tiny", action="store_true", help="a small problem, to try the script")
    options = parser.parse_args(arguments)
    case = Case(**({"rows": 128, "hidden": 64, "vocab": 1024} if options.tiny else SHAPE))
    record, path = Record.open(options.results, NAME, options.device)
    problem = Problem(case, options.device)
    table = []
    for name, micro_batches, compute in measurements(problem):
        shape = case.sizes | {"micro_batches": micro_batches}
        row = {"provider": name, "shape": shape, "dtype": case.dtype, **measure(compute, options.device)}
        record.add(row)
        record.save(path)
        table.append((name, micro_batches, row["d_hidden"], row["d_weight"], row["error"]))
        print(NAME, *table[-1], file=sys.stderr)
    columns = ("provider", "micro-batches", "error of dX", "error of dW", "note")
    show_table(f"{NAME} on {record.device}", columns, table)


if __name__ == "__main__":
    main()
