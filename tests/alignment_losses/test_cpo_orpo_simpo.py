"""CPO, SimPO, AlphaPO and ORPO against TRL's own code over plain float64 logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.alignment_losses import (
    CPO_LOSS_TYPES,
    LigerFusedLinearCPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
    cpo_loss,
)

from .heads import TILES, assert_same_loss, make_head, make_labels, stub_trainer

B = 3
pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")


def log_probs(head, labels, average):
    tokens = head.fused(labels).log_probs
    return tokens.sum(-1) / ((labels != -100).sum(-1) if average else 1)


def chosen_nll(head, labels):
    return F.cross_entropy(head.logits()[:B].flatten(0, 1), labels[:B].flatten())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reward_alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", CPO_LOSS_TYPES)
def test_cpo(loss_type, reward_alpha, label_smoothing):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    head, labels = make_head(2 * B), make_labels(2 * B)
    options = {"beta": 0.3, "label_smoothing": label_smoothing, "simpo_gamma": 0.8}
    trl_type = "simpo" if loss_type == "alphapo" else loss_type  # which TRL's config makes of it
    average = trl_type in ("ipo", "simpo")
    if reward_alpha and not average:  # of whole answers it overflows
        reward_alpha = 0.01
    module = LigerFusedLinearCPOLoss(loss_type=loss_type, alpha=0.6, reward_alpha=reward_alpha, **options, **TILES)
    loss, logged = module(head.weight, head.hidden, labels, head.bias)
    logps = log_probs(head, labels, average)
    trainer = stub_trainer(loss_type=trl_type, alpha=reward_alpha, **options)
    losses, *rewards = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))
    nll = chosen_nll(head, labels)
    assert_same_loss(loss, losses.mean() + 0.6 * nll, head)
    for ours, theirs in zip(logged, (*logps.chunk(2), None, None, nll, *rewards), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_simpo():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    head, labels = make_head(2 * B), make_labels(2 * B)
    module = LigerFusedLinearSimPOLoss(beta=2.0, gamma=1.4, label_smoothing=0.1, compute_nll_loss=False, **TILES)
    loss, _ = module(head.weight, head.hidden, labels, head.bias)
    trainer = stub_trainer(loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=1.4, label_smoothing=0.1)
    losses, *_ = CPOTrainer.cpo_loss(trainer, *log_probs(head, labels, True).chunk(2))
    assert_same_loss(loss, losses.mean(), head)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_orpo(with_prompt):
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    head, labels = make_head(2 * B), make_labels(2 * B)
    nll_target = None
    if with_prompt:
        nll_target = labels[:B].clone()
        nll_target[:, :2] = 5
    module = LigerFusedLinearORPOLoss(beta=0.4, **TILES)
    loss, logged = module(head.weight, head.hidden, labels, head.bias, nll_target)
    logps = log_probs(head, labels, True)
    trainer = stub_trainer(beta=0.4)

    class Double(torch.Tensor):
        """TRL casts to fp32 there."""

        def float(self):
            return self

    pairs = (each.as_subclass(Double) for each in logps.chunk(2))
    losses, _, _, ratio, log_odds = ORPOTrainer.odds_ratio_loss(trainer, *pairs)
    nll = chosen_nll(head, labels if nll_target is None else nll_target)
    assert_same_loss(loss, (nll - losses.mean()).as_subclass(torch.Tensor), head)
    for ours, theirs in zip(logged, (*logps.chunk(2), None, None, nll, ratio, log_odds), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor))


def test_orpo_of_probabilities_near_one_and_zero():
    from liger_trainer.alignment_losses.orpo import log_odds_ratio

    chosen = torch.tensor([-1e-6, -0.6, -30.0], requires_grad=True)
    rejected = torch.tensor([-0.7, -1e-6, -1e-3], requires_grad=True)

    def exact(x):
        return x - torch.log(-torch.expm1(x))

    expected = exact(chosen.double()) - exact(rejected.double())
    torch.testing.assert_close(log_odds_ratio(chosen, rejected).double(), expected, rtol=1e-5, atol=1e-6)


def test_unknown_types_and_shapes_say_so():
    with pytest.raises(ValueError, match=r"loss_type must be among \('sigmoid', 'hinge'.*got 'dpo'"):
        cpo_loss(torch.zeros(1), torch.zeros(1), loss_type="dpo")
    with pytest.raises(ValueError, match="loss_type must be among"):
        LigerFusedLinearCPOLoss(loss_type="dpo")
    head, labels = make_head(2 * B), make_labels(2 * B)
    with pytest.raises(ValueError, match="nll_target must have the shape of the chosen half"):
        LigerFusedLinearORPOLoss()(head.weight, head.hidden, labels, head.bias, labels)
