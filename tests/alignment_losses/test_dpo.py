"""DPO and its relatives against TRL's own code over plain float64 logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from liger_trainer.alignment_losses import DPO_LOSS_TYPES, LigerFusedLinearDPOLoss, dpo_loss
from liger_trainer.alignment_losses.dpo import F_DIVERGENCES

from .heads import TILES, H, T, V, assert_same_loss, make_head, make_labels, stub_trainer

B = 3


def trl_loss(head, reference, labels, **options):
    """``DPOTrainer._compute_loss`` with a model that is a head alone."""
    from trl.trainer.dpo_trainer import DPOTrainer

    ld_alpha = options.get("ld_alpha")

    def total(log_probs, mask):
        if ld_alpha is None:
            return log_probs.sum(1)
        lengths = mask.sum(1)
        rows = []
        for i in range(2 * B):  # token by token, as the paper has it
            shared = min(int(lengths[i % B]), int(lengths[i % B + B]))
            scored = log_probs[i][mask[i]]
            rows.append(scored[:shared].sum() + ld_alpha * scored[shared:].sum())
        return torch.stack(rows)

    mask = labels != -100
    ref_logps = total(reference.fused(labels).log_probs, mask).detach()
    unshifted = torch.cat([torch.zeros(2 * B, 1, dtype=torch.long), labels.clamp(min=0)], 1)
    inputs = {
        "input_ids": unshifted,
        "attention_mask": torch.ones_like(unshifted),
        "completion_mask": torch.cat([torch.zeros(2 * B, 1, dtype=torch.long), mask.long()], 1),
        "ref_chosen_logps": ref_logps[:B],
        "ref_rejected_logps": ref_logps[B:],
    }
    types = options.get("loss_type", "sigmoid")
    types = [types] if isinstance(types, str) else types
    trainer = stub_trainer(
        ld_alpha=ld_alpha,
        f_divergence_type=options.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 1.0),
        loss_types=types,
        loss_weights=options.get("loss_weights") or [1.0] * len(types),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("use_weighting", False),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
    )
    loss = DPOTrainer._compute_loss(trainer, lambda **_: head.fused(labels), inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def check(dtype=torch.float64, **options):
    head, reference, labels = make_head(2 * B), make_head(2 * B, 1, trained=False), make_labels(2 * B)
    if dtype != torch.float64:
        head = type(head)(*(each.detach().to(dtype).requires_grad_() for each in head))
        reference = type(reference)(*(each.to(dtype) for each in reference))
    module = LigerFusedLinearDPOLoss(**options, **TILES)
    loss, logged = module(
        head.weight,
        head.hidden,
        labels,
        head.bias,
        ref_input=reference.hidden,
        ref_weight=reference.weight,
        ref_bias=reference.bias,
    )
    expected, metrics = trl_loss(head, reference, labels, **options)
    tolerances = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    if options.get("loss_type") == "exo_pair":  # whose label smoothing TRL makes an fp32 tensor
        tolerances = {"rtol": 1e-6, "atol": 1e-7}
    assert_same_loss(loss, expected, head, **tolerances)
    chosen, rejected, chosen_logits, rejected_logits, _nll, *rewards = logged
    close = {"rel": 1e-5}
    assert chosen.mean().item() == pytest.approx(metrics["logps/chosen"], **close)
    assert rejected.mean().item() == pytest.approx(metrics["logps/rejected"], **close)
    assert chosen_logits.item() == pytest.approx(metrics["logits/chosen"], **close)
    assert rejected_logits.item() == pytest.approx(metrics["logits/rejected"], **close)
    assert rewards[0].mean().item() == pytest.approx(metrics["rewards/chosen"], **close)
    assert rewards[1].mean().item() == pytest.approx(metrics["rewards/rejected"], **close)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_every_loss_type(loss_type, beta):
    check(loss_type=loss_type, beta=beta, label_smoothing=0.1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "aot", "aot_unpaired"])
def test_without_label_smoothing(loss_type):
    check(loss_type=loss_type)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "sigmoid_norm"])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_divergences(divergence, loss_type):
    check(loss_type=loss_type, f_divergence=divergence)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_divergence(alpha):
    check(torch.float32, f_divergence="alpha_divergence", f_alpha=alpha)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sppo_hard"])
@pytest.mark.parametrize("ld_alpha", [None, 0.3, 1.0])
@pytest.mark.parametrize("use_weighting", [False, True])
def test_weighted_tokens_and_pairs(loss_type, ld_alpha, use_weighting):
    check(loss_type=loss_type, ld_alpha=ld_alpha, use_weighting=use_weighting)


def test_likelihood_alone_with_weights():
    """TRL's code multiplies an expanded tensor in place there, which PyTorch refuses."""
    head, labels = make_head(2 * B), make_labels(2 * B)
    module = LigerFusedLinearDPOLoss(loss_type="sft", use_weighting=True, use_ref_model=False)
    loss, logged = module(head.weight, head.hidden, labels, head.bias)
    scored = head.fused(labels)
    aligned = (scored.log_probs - scored.log_sum_sq_probs).sum(-1) / (labels != -100).sum(-1)
    weights = aligned.exp().detach()
    torch.testing.assert_close(loss, logged[4] * (weights[:B] * weights[B:]).mean())


def test_several_types_with_weights():
    check(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5])
    check(loss_type=["sigmoid", "sft"], ld_alpha=0.4)
    check(loss_type=["hinge"], discopop_tau=0.1)


def test_references_given_absent_or_to_be_scored():
    head, reference, labels = make_head(2 * B), make_head(2 * B, 1), make_labels(2 * B)
    scored, _ = LigerFusedLinearDPOLoss()(
        head.weight,
        head.hidden,
        labels,
        head.bias,
        ref_input=reference.hidden,
        ref_weight=reference.weight,
        ref_bias=reference.bias,
    )
    assert all(each is None for each in torch.autograd.grad(scored, reference, retain_graph=True, allow_unused=True))
    ref_logps = reference.fused(labels).log_probs.sum(-1).detach()
    given, _ = LigerFusedLinearDPOLoss()(head.weight, head.hidden, labels, head.bias, ref_logps=ref_logps)
    torch.testing.assert_close(scored, given)
    absent, (chosen, rejected, *_) = LigerFusedLinearDPOLoss(use_ref_model=False)(
        head.weight, head.hidden, labels, head.bias
    )
    torch.testing.assert_close(absent, dpo_loss(chosen, rejected).mean())
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input and ref_weight"):
        LigerFusedLinearDPOLoss()(head.weight, head.hidden, labels, head.bias)


def test_likelihood_of_the_chosen():
    head, labels = make_head(2 * B), make_labels(2 * B)
    arguments = head.weight, head.hidden, labels, head.bias
    plain, logged = LigerFusedLinearDPOLoss(use_ref_model=False)(*arguments)
    more, _ = LigerFusedLinearDPOLoss(use_ref_model=False, compute_nll_loss=True)(*arguments)
    nll = torch.nn.functional.cross_entropy(head.logits()[:B].flatten(0, 1), labels[:B].flatten())
    torch.testing.assert_close(logged[4], nll)
    torch.testing.assert_close(more, plain + nll)


def test_wrong_options_say_so():
    pairs = [torch.randn(3) for _ in range(4)]
    for options, message in [
        ({"loss_type": "sigmoidal"}, r"loss_type must be among \('sigmoid'.*got 'sigmoidal'"),
        ({"loss_type": "ipo"}, "need chosen_lengths and rejected_lengths"),
        ({"loss_type": "sft"}, "needs chosen_nll"),
        ({"loss_type": "exo_pair"}, r"needs label_smoothing in \(0, 1\), got 0.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "other than 0.5"),
        ({"f_divergence": "kl"}, "divergence must be among"),
    ]:
        with pytest.raises(ValueError, match=message):
            dpo_loss(*pairs, **options)
    with pytest.raises(ValueError, match="loss_weights must have one number a loss type, 1; got 2"):
        LigerFusedLinearDPOLoss(loss_weights=[1, 2])
    with pytest.raises(ValueError, match="ld_alpha weighs the tokens of a sum"):
        LigerFusedLinearDPOLoss(ld_alpha=0.5, average_log_prob=True)


def test_arguments_in_another_modules_order_are_refused():
    head, labels = make_head(2 * B), make_labels(2 * B)
    with pytest.raises(
        ValueError, match=rf"\(B, T, H\), \(V, H\) and \(B, T\); got \({V}, {H}\), \({2 * B}, {T}, {H}\)"
    ):
        LigerFusedLinearDPOLoss(use_ref_model=False)(head.hidden, head.weight, labels)
