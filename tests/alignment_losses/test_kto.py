"""KTO against TRL's own code over plain float64 logits."""

from __future__ import annotations

import pytest
import torch

from liger_trainer.alignment_losses import KTO_LOSS_TYPES, LigerFusedLinearKTOLoss, kto_kl, kto_loss

from .heads import TILES, V, assert_same_loss, make_head, make_labels, stub_trainer

B = 4


def trl_loss(head, reference, labels, desirable, KL_logps, ref_KL_logps, **options):
    from trl.trainer.kto_trainer import KTOTrainer

    mask = (labels != -100).long()
    unshifted = torch.cat([torch.zeros(B, 1, dtype=torch.long), labels.clamp(min=0)], 1)
    inputs = {
        "input_ids": unshifted,
        "attention_mask": torch.ones_like(unshifted),
        "completion_mask": torch.cat([torch.zeros(B, 1, dtype=torch.long), mask], 1),
        "label": desirable,
        "ref_logps": reference.fused(labels).log_probs.sum(-1),
        "ref_KL_logps": ref_KL_logps,
    }
    trainer = stub_trainer(
        calculate_KL=options["loss_type"] == "kto",
        _compute_kl_logps=lambda *_: KL_logps,
        **options,
    )
    loss = KTOTrainer._compute_loss(trainer, lambda **_: head.fused(labels), inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("offset", [-5.0, 2.0])  # a divergence that is clamped, and one that is not
@pytest.mark.parametrize("desirable", [[True, False, False, True], [True] * 4, [False] * 4])
@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
def test_every_loss_type(loss_type, desirable, offset):
    head, reference, labels = make_head(B), make_head(B, 1, trained=False), make_labels(B)
    desirable = torch.tensor(desirable)
    KL_logps = torch.randn(B, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    module = LigerFusedLinearKTOLoss(use_ref_model=True, **options, **TILES)
    loss, logged = module(
        head.hidden,
        head.weight,
        labels,
        head.bias,
        desirable,
        ref_input=reference.hidden,
        ref_weight=reference.weight,
        ref_bias=reference.bias,
        kl=kto_kl(KL_logps + offset, KL_logps),
    )
    expected, metrics = trl_loss(head, reference, labels, desirable, KL_logps + offset, KL_logps, **options)
    assert_same_loss(loss, expected, head)
    for kind, count, chosen in (("chosen", desirable.sum(), 0), ("rejected", (~desirable).sum(), 1)):
        if not count:
            continue
        assert logged[chosen].item() / count == pytest.approx(metrics[f"logps/{kind}"])
        tokens = (labels[desirable if kind == "chosen" else ~desirable] != -100).sum()
        assert logged[2 + chosen].item() / V / tokens == pytest.approx(metrics[f"logits/{kind}"])
        assert logged[4 + chosen].item() / count == pytest.approx(metrics[f"rewards/{kind}"])


def test_without_reference_and_without_divergence():
    logps, desirable = torch.randn(B), torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        kto_loss(logps, None, desirable), kto_loss(logps, torch.zeros(B), desirable, torch.zeros(()))
    )
    head, labels = make_head(B), make_labels(B)
    arguments = head.hidden, head.weight, labels, head.bias
    loss, _ = LigerFusedLinearKTOLoss()(*arguments, desirable)
    torch.testing.assert_close(loss, kto_loss(head.fused(labels).log_probs.sum(-1), None, desirable).mean())
    with pytest.raises(ValueError, match="preference_labels must be a bool an answer"):
        LigerFusedLinearKTOLoss()(*arguments)
    with pytest.raises(ValueError, match="loss_type must be among"):
        LigerFusedLinearKTOLoss(loss_type="bco")
