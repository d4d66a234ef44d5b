"""GRPO and its relatives against TRL's own code over plain float64 logits."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from liger_trainer.alignment_losses import GRPO_LOSS_TYPES, GRPOOptions, LigerFusedLinearGRPOLoss, grpo_loss

from .heads import TILES, T, V, assert_same_loss, make_head, make_labels, stub_trainer

B = 6


def trl_loss(head, ids, mask, advantages, options, inputs, *, num_items, is_ratio=None, entropy_mask=None):
    from trl.trainer.grpo_trainer import GRPOTrainer

    fused = head.fused(ids.masked_fill(mask == 0, -100))
    args = SimpleNamespace(
        delta=options.delta,
        use_bias_correction_kl=options.use_bias_correction_kl,
        steps_per_generation=1,
        **{name: getattr(options, name) for name in vars(options) if name.startswith(("sapo", "vespo"))},
    )
    trainer = stub_trainer(
        args=args,
        beta=options.beta,
        loss_type=options.loss_type,
        importance_sampling_level=options.importance_sampling_level,
        epsilon_low=options.epsilon_low,
        epsilon_high=options.epsilon_high,
        max_completion_length=options.max_completion_length,
        top_entropy_quantile=1.0 if entropy_mask is None else 0.5,
        get_high_entropy_mask=lambda *_: entropy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        off_policy_mask_threshold=None,
        use_vllm=is_ratio is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=options.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=options.entropy_coef,
        _get_per_token_logps_and_entropies=lambda *_, **__: (fused.log_probs, fused.entropy, None),
    )
    batch = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(float(num_items)),
        **inputs,
    }
    if is_ratio is not None:
        batch["importance_sampling_ratio"] = is_ratio
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def check(*, old=True, per_token_advantages=False, is_ratio=None, entropy_mask=None, num_items=None, **options):
    generator = torch.Generator().manual_seed(0)
    head, labels = make_head(B), make_labels(B)
    mask = (labels != -100).long()
    ids = labels.clamp(min=0)
    options = GRPOOptions(**{"loss_type": "grpo", "max_completion_length": 9, "epsilon_low": 0.1, **options})

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = head.fused(labels).log_probs.detach()
    inputs = {"ref_per_token_logps": logps + 0.3 * noise(B, T)}
    inputs["old_per_token_logps"] = logps + 0.3 * noise(B, T) if old else None
    advantages = noise(B, T) if per_token_advantages else noise(B)
    if is_ratio is not None:
        is_ratio = 0.2 * noise(B, is_ratio).abs() + 0.8
    if entropy_mask is not None:
        entropy_mask = noise(B, T) > 0
    module = LigerFusedLinearGRPOLoss(**dataclasses.asdict(options), **TILES)
    items = mask.sum() if num_items is None else num_items
    loss, logged = module(
        head.hidden,
        head.weight,
        ids,
        mask,
        advantages,
        head.bias,
        ref_per_token_logps=inputs["ref_per_token_logps"],
        old_per_token_logps=inputs["old_per_token_logps"],
        vllm_is_ratio=is_ratio,
        num_items=num_items,
        token_mask=entropy_mask,
    )
    expected, metrics = trl_loss(
        head, ids, mask, advantages, options, inputs, num_items=items, is_ratio=is_ratio, entropy_mask=entropy_mask
    )
    assert_same_loss(loss, expected, head)
    clipped = metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio"))
    names = [metrics["kl"]] if options.beta else []
    names += [] if clipped is None else [clipped]
    assert [each.item() for each in logged] == pytest.approx(names, rel=1e-6)
    return metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", GRPO_LOSS_TYPES)
def test_every_loss_type(loss_type, beta, level):
    epsilon_high = 1.2 if loss_type == "cispo" else 0.15
    metrics = check(loss_type=loss_type, beta=beta, importance_sampling_level=level, epsilon_high=epsilon_high)
    if level == "token" and loss_type not in ("sapo", "vespo"):
        assert metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio")) > 0


@pytest.mark.parametrize("loss_type", GRPO_LOSS_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"old": False},
        {"delta": 1.3},
        {"beta": 0.2, "use_bias_correction_kl": True},
        {"per_token_advantages": True},
        {"entropy_coef": 0.05},
        {"entropy_mask": True, "entropy_coef": 0.05, "beta": 0.1},
        {"is_ratio": T},
        {"num_items": 31},
        {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.9, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(loss_type, options):
    check(loss_type=loss_type, **options)


def test_reference_scored_here_or_before():
    head, reference, labels = make_head(B), make_head(B, 1, trained=False), make_labels(B)
    mask, ids, advantages = (labels != -100).long(), labels.clamp(min=0), torch.randn(B, dtype=torch.float64)
    module = LigerFusedLinearGRPOLoss(beta=0.3)
    arguments = head.hidden, head.weight, ids, mask, advantages, head.bias
    scored, _ = module(*arguments, ref_input=reference.hidden, ref_weight=reference.weight, ref_bias=reference.bias)
    given, _ = module(*arguments, ref_per_token_logps=reference.fused(labels).log_probs)
    torch.testing.assert_close(scored, given)
    neither, (kl, _) = module(*arguments)
    assert kl == 0
    torch.testing.assert_close(neither, LigerFusedLinearGRPOLoss(beta=0.0)(*arguments)[0])


def test_temperature_is_the_heads():
    head, labels = make_head(B), make_labels(B)
    mask, ids, advantages = (labels != -100).long(), labels.clamp(min=0), torch.randn(B, dtype=torch.float64)
    cooled = type(head)(head.hidden, head.weight / 0.6, head.bias / 0.6)
    losses = [
        LigerFusedLinearGRPOLoss(beta=0.0, temperature=temperature)(
            each.hidden, each.weight, ids, mask, advantages, each.bias
        )[0]
        for each, temperature in ((head, 0.6), (cooled, 1.0))
    ]
    assert_same_loss(*losses, head)


def test_what_is_missing_is_named():
    logps, advantages, mask = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3)
    for options, message in [
        (GRPOOptions(beta=0.1), "beta=0.1 needs ref_logps"),
        (GRPOOptions(entropy_coef=0.1), "entropy_coef=0.1 needs entropy"),
        (GRPOOptions(loss_type="dr_grpo"), "'dr_grpo' needs max_completion_length"),
    ]:
        with pytest.raises(ValueError, match=message):
            grpo_loss(logps, None, advantages, mask, options)
    assert V
