"""Losses and log-probabilities behind FSDP2's cast of a model's outputs, which are to be those without a cast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from liger_trainer.patching.exact_outputs import from_bytes, keep_exact, to_bytes
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


class Scores(nn.Linear):
    """Outputs of each kind: by name, in a tuple or alone."""

    def forward(self, hidden: Tensor, kind: str = "named") -> Any:  # type: ignore[override]
        scores = super().forward(hidden).log_softmax(-1)
        loss = scores.square().mean()
        match kind:
            case "named":
                return {"loss": loss, "log_probs": scores, "logits": scores, "is_top1": scores > -1, "entropy": None}
            case "tuple":
                return loss, scores, scores.unsqueeze(0), None
            case _:
                return loss


def behind_a_cast(dtype: torch.dtype | None, kind: str, after: bool = True) -> dict[str, Any]:
    """Outputs, gradients and hooks of a module in FSDP2, by two forwards; kept exact ``after`` it was given to it."""
    torch.manual_seed(0)
    module, hidden = Scores(5, 7), torch.randn(3, 5)
    if not after:
        keep_exact(module)
    fully_shard(module, mp_policy=MixedPrecisionPolicy(output_dtype=dtype))
    before = len(module._forward_hooks)
    for _ in range(2):
        if after:
            keep_exact(module)
        module.zero_grad()
        outputs = module(hidden, kind=kind)
        tensors = outputs.values() if kind == "named" else outputs if kind == "tuple" else [outputs]
        found = [each for each in tensors if each is not None]
        sum(each.float().sum() / 3 for each in found[:2]).backward()
    gradients = [each.grad.full_tensor() for each in module.parameters()]
    outputs = [each.detach() for each in found]
    return {"outputs": outputs, "gradients": gradients, "hooks": len(module._forward_hooks) - before}


@pytest.mark.parametrize("kind", ["named", "tuple", "alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_unit_returns(two_processes: Group, dtype: torch.dtype, kind: str) -> None:
    cast, whole = (two_processes.run(behind_a_cast, each, kind)[0] for each in (dtype, None))
    assert (cast["hooks"], whole["hooks"]) == (2, 0)
    for ours, theirs in zip(cast["outputs"][:2] + cast["gradients"], whole["outputs"][:2] + whole["gradients"]):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(cast["outputs"][2:], whole["outputs"][2:], strict=True):  # logits, and no number
        assert ours.dtype == (dtype if theirs.is_floating_point() else theirs.dtype)
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_nothing_changes_before_fsdp2_has_the_module(two_processes: Group) -> None:
    cast = two_processes.run(behind_a_cast, torch.bfloat16, "named", after=False)[0]
    assert cast["hooks"] == 0 and cast["outputs"][0].dtype == torch.bfloat16


def refused(dtype: torch.dtype) -> str:
    try:
        return str(behind_a_cast(dtype, "alone"))
    except TypeError as error:
        return str(error)


def test_a_dtype_that_holds_no_byte_is_named(two_processes: Group) -> None:
    assert "losses can't be returned in torch.float8_e5m2" in two_processes.run(refused, torch.float8_e5m2)[0]


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
