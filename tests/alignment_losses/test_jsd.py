"""The distillation loss against TRL's own code over plain float64 logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.alignment_losses import LigerFusedLinearJSDLoss, jsd_loss

from .heads import V, assert_same_loss, make_head, make_labels

B = 3
pytestmark = pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")


@pytest.mark.parametrize("beta", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.7, 0.1)])
def test_both_parts(beta, weights):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    head, teacher, labels = make_head(B), make_head(B, 1, trained=False), make_labels(B)
    hard, soft = weights
    loss = LigerFusedLinearJSDLoss(hard, soft, beta, temperature=1.3, tile_bytes=6 * V * 8)(
        head.hidden, head.weight, teacher.hidden, teacher.weight, labels, head.bias, teacher.bias
    )
    divergence = GKDTrainer.generalized_jsd_loss(head.logits(), teacher.logits(), labels, beta, 1.3)
    cross_entropy = F.cross_entropy(head.logits().flatten(0, 1), labels.flatten())
    assert_same_loss(loss, hard * cross_entropy + soft * divergence, head)
    log_probs = [(each.logits() / 1.3).log_softmax(-1)[labels != -100] for each in (head, teacher)]
    assert_same_loss(jsd_loss(*log_probs, beta=beta).mean(), divergence, head)


def test_beta_outside_says_so():
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 2"):
        jsd_loss(torch.zeros(1, 2), torch.zeros(1, 2), beta=2)
