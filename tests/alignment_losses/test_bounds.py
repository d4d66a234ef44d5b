"""A bound of the number of labels: policy and reference share it, whoever gives it, and no loss changes by it."""

from __future__ import annotations

import pytest
import torch

from liger_trainer import alignment_losses
from liger_trainer.alignment_losses import _sequences

from .heads import TILES, make_head, make_labels

B = 2
LABELS = make_labels(2 * B)
COUNT = int((LABELS != -100).sum())


def run(name, policy, reference, **options):
    module = getattr(alignment_losses, f"LigerFusedLinear{name}Loss")
    if name == "KTO":
        good = torch.arange(2 * B) % 2 == 0
        loss = module(use_ref_model=True, **TILES)
        return loss(*policy[:2], LABELS, policy.bias, good, *reference, **options)[0]
    if name == "GRPO":
        mask, advantages = (LABELS != -100).long(), torch.arange(2.0 * B).double()
        ids, refs = LABELS.clamp(min=0), dict(zip(("ref_input", "ref_weight", "ref_bias"), reference))
        return module(**TILES)(*policy[:2], ids, mask, advantages, policy.bias, **refs, **options)[0]
    refs = reference if name == "DPO" else ()
    return module(**TILES)(policy.weight, policy.hidden, LABELS, policy.bias, *refs, **options)[0]


@pytest.mark.parametrize("name", ["DPO", "ORPO", "CPO", "SimPO", "KTO", "GRPO"])
def test_bounds(name, monkeypatch):
    bounds = []
    op = _sequences.linear_log_probs

    def recorded(*args, max_valid, **options):
        bounds.append(max_valid)
        return op(*args, max_valid=max_valid, **options)

    monkeypatch.setattr(_sequences, "linear_log_probs", recorded)
    gradients = []
    for bound in (None, COUNT, COUNT + 3, LABELS.numel()):
        policy, reference = make_head(2 * B), make_head(2 * B, 1, trained=False)
        bounds.clear()
        loss = run(name, policy, reference, **({} if bound is None else {"max_valid": bound}))
        assert bounds == [COUNT if bound is None else bound] * (2 if name in ("DPO", "KTO", "GRPO") else 1)
        gradients.append(torch.cat([each.flatten() for each in (loss, *torch.autograd.grad(loss, policy.leaves))]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    assert run(name, policy, reference, max_valid=COUNT - 1).isnan()
