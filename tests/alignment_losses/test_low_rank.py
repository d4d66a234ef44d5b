"""A LoRA adapter on the head of each module: the loss and gradients of the dense weight W + s B A, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.alignment_losses import LigerFusedLinearJSDLoss
from liger_trainer.modules import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

from .heads import TILES, H, V, make_head
from .test_bounds import LABELS, run

R, SCALE = 3, 1.7
BATCH = len(LABELS)


def adapter(seed=5):
    """A (r, H) and B (V, r)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (R, H), (V, R)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).mul_(0.3).requires_grad_() for s in shapes)


def cross_entropy(policy, reference, *, reduction="mean", low_rank=None):
    return LigerFusedLinearCrossEntropyLoss(reduction=reduction)(
        policy.weight, policy.hidden, LABELS, policy.bias, low_rank=low_rank
    ).mean()


def distillation(module, with_biases, policy, reference, low_rank=None):
    """Of a teacher without an adapter."""
    inputs = policy.hidden, policy.weight, reference.hidden, reference.weight
    options = {} if low_rank is None else {"student_low_rank": low_rank}
    if not with_biases:
        inputs = tuple(each.flatten(0, -2) for each in inputs)
        options = {name: (a.flatten(0, -2), b) for name, (a, b) in options.items()}
        return module()(*inputs, LABELS.flatten(), **options)
    return module(**TILES_OF_JSD)(*inputs, LABELS, policy.bias, reference.bias, **options)


TILES_OF_JSD = {"tile_bytes": TILES["tile_bytes"]}
LOSSES = {
    **{
        name: lambda policy, reference, name=name, **options: run(name, policy, reference, **options)
        for name in ("DPO", "ORPO", "CPO", "SimPO", "KTO", "GRPO")
    },
    "cross entropy": cross_entropy,
    "no reduction": lambda *heads, **options: cross_entropy(*heads, reduction="none", **options),
    "distillation": lambda *heads, **options: distillation(LigerFusedLinearJSDLoss, True, *heads, **options),
    "divergence": lambda *heads, **options: distillation(LigerFusedLinearJSD, False, *heads, **options),
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_dense_weights(name, frozen):
    results = []
    for dense in (False, True):
        policy, reference = make_head(BATCH), make_head(BATCH, 1, trained=False)
        policy.weight.requires_grad_(not frozen)
        a, b = adapter()
        if dense:
            loss = LOSSES[name](policy._replace(weight=policy.weight + SCALE * b @ a), reference)
        else:
            loss = LOSSES[name](policy, reference, low_rank=(SCALE * F.linear(policy.hidden, a), b))
        leaves = [a, b, policy.hidden, *([] if frozen else [policy.weight])]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_teachers_adapter(beta):
    student, teacher = make_head(BATCH), make_head(BATCH, 1, trained=False)
    a, b = (each.detach() for each in adapter())
    term = SCALE * F.linear(teacher.hidden, a), b
    merged = teacher.weight + SCALE * b @ a
    module, flat = LigerFusedLinearJSDLoss(beta=beta), LigerFusedLinearJSD(beta)
    heads = student.hidden, student.weight, teacher.hidden
    torch.testing.assert_close(
        module(*heads, teacher.weight, LABELS, teacher_low_rank=term), module(*heads, merged, LABELS)
    )
    torch.testing.assert_close(
        flat(*heads, teacher.weight, LABELS, teacher_low_rank=term), flat(*heads, merged, LABELS)
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "divergence"])
def test_a_pair_that_does_not_fit(name):
    policy, reference = make_head(BATCH), make_head(BATCH, 1, trained=False)
    _, b = adapter()
    with pytest.raises(ValueError, match=r"low_rank\[0\] must have shape"):
        LOSSES[name](policy, reference, low_rank=(torch.zeros(2, R).double(), b))
