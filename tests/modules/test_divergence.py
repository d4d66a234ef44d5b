"""The divergence modules against the functions they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from liger_trainer.kernels import jsd
from liger_trainer.modules import LigerFusedLinearJSD, LigerJSD, LigerKLDIVLoss


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(reduction, log_target):
    log_q = torch.randn(4, 9).log_softmax(-1).requires_grad_()
    target = torch.randn(4, 9).log_softmax(-1) if log_target else torch.randn(4, 9).softmax(-1)
    options = {"reduction": reduction, "log_target": log_target}
    losses = [module(log_q, target).sum() for module in (LigerKLDIVLoss(**options), nn.KLDivLoss(**options))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, log_q)[0] for loss in losses))


def test_jsd_over_two_heads_and_over_their_logits():
    student, teacher = torch.randn(7, 8, requires_grad=True), torch.randn(7, 5)
    weight, teacher_weight = torch.randn(11, 8, requires_grad=True), torch.randn(11, 5)
    labels = torch.arange(7)
    labels[[0, 3]] = -1
    logits = F.linear(student, weight), F.linear(teacher, teacher_weight)
    for beta in (0.0, 0.3, 1.0):
        expected = jsd(*(each / 2 for each in logits), beta=beta, labels=labels, ignore_index=-1)
        fused = LigerFusedLinearJSD(beta, -1, 2.0)(student, weight, teacher, teacher_weight, labels)
        given = LigerJSD(beta, -1)(*((each / 2).log_softmax(-1) for each in logits), labels)
        torch.testing.assert_close(fused, expected)
        torch.testing.assert_close(given, expected)
    everything = jsd(*logits)
    torch.testing.assert_close(LigerFusedLinearJSD()(student, weight, teacher, teacher_weight), everything)
    torch.testing.assert_close(LigerJSD()(*(each.log_softmax(-1) for each in logits)), everything)
