"""Losses and log-probabilities behind FSDP2's cast of a model's outputs, which are to be those without a cast."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liger_trainer.patching.exact_outputs import from_bytes, to_bytes
from tests.distributed import accelerated
from tests.distributed.group import Group

LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, LARGEST, -LARGEST, SMALLEST, -3 * SMALLEST, 1e-38, 1 + 2**-23]


def bits(values: Tensor) -> list[int]:
    assert values.dtype == torch.float32
    return values.contiguous().view(torch.int32).flatten().tolist()


def values(*shape: int) -> Tensor:
    """All exponents and signs, and the numbers that are none."""
    torch.manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (math.prod(shape),), dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor(SPECIAL)[: drawn.numel()]
    drawn[: special.numel()] = special
    return drawn.view(shape)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("given", [values(13, 7), values(7, 26)[:, ::2].t(), values(1)[0], values(0, 3)], ids="2t0e")
def test_values_and_gradients_pass_to_the_last_bit(given: Tensor, dtype: torch.dtype | None) -> None:
    leaf = given.clone().requires_grad_()
    numbers = to_bytes(leaf)
    assert numbers.dtype == torch.bfloat16 and numbers.isfinite().all()
    cast = numbers if dtype is None else numbers.to(dtype)
    joined = from_bytes(cast)
    assert joined.shape == given.shape and bits(joined) == bits(given)
    gradient = values(*given.shape).flip(list(range(given.dim())))
    seen: list[Tensor] = []
    cast.register_hook(lambda each: seen.append(each))
    # What autograd does with a gradient that is not contiguous.
    (found,) = torch.autograd.grad(joined, leaf, gradient.t().contiguous().t() if given.dim() == 2 else gradient)
    assert bits(found) == bits(gradient)
    assert seen[0].isfinite().all()


def test_gradients_of_losses_on_both_sides() -> None:
    """As of a sum, whose gradient has strides of zero, with other functions before and behind."""
    given = torch.randn(5, 6, dtype=torch.float32, requires_grad=True)
    direct, passed = (f(given * 3).exp().sum(1).log().mean() for f in (lambda x: x, lambda x: from_bytes(to_bytes(x))))
    assert direct == passed
    assert torch.equal(*(torch.autograd.grad(each, given)[0] for each in (direct, passed)))


def assert_same(rounded: list[dict[str, float]], exact: list[dict[str, float]]) -> None:
    assert len(rounded) == len(exact) == accelerated.STEPS + 2
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6, abs=1e-7)
        assert ours.keys() == theirs.keys()


KINDS = ["trainer", "dpo", "orpo"]
MORE = ["dpo-lora", "dpo-stock", "cpo", "kto", "sft", "gkd"]


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_what_a_trainer_logs_under_accelerates_fsdp2(two_processes: Group, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rounded, exact = (two_processes.run(accelerated.log, kind, casts, tmp_path)[0] for casts in (True, False))
    if kind in ("dpo", "dpo-stock"):  # the policy is its reference still
        assert rounded[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same(rounded, exact)
