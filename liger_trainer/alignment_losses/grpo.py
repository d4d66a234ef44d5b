"""Group relative policy optimisation (Shao et al., 2024, https://arxiv.org/abs/2402.03300) and its relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._sequences import HeadLoss, check_names

__all__ = [
    "GRPO_LOSS_TYPES",
    "GRPOOptions",
    "GRPOOutput",
    "LigerFusedLinearGRPOLoss",
    "grpo_loss",
    "k3_divergence",
    "vespo_weights",
]

GRPO_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class GRPOOptions:
    """The constants of :func:`grpo_loss`, under TRL's names.

    Raises:
        ValueError: for an unknown ``loss_type`` or ``importance_sampling_level``.
    """

    loss_type: str = "dapo"
    beta: float = 0.0  # weight of the divergence from the reference
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None  # upper bound of the ratio on the unclipped side
    importance_sampling_level: str = "token"  # or "sequence": GSPO, Zheng et al., 2025, arXiv 2507.18071
    max_completion_length: int | None = None  # of dr_grpo
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    use_bias_correction_kl: bool = False  # DeepSeek-V3.2: the divergence times the ratio
    entropy_coef: float = 0.0  # what a nat of mean entropy takes off the loss

    def __post_init__(self) -> None:
        check_names("loss_type", (self.loss_type,), GRPO_LOSS_TYPES)
        check_names("importance_sampling_level", (self.importance_sampling_level,), IMPORTANCE_SAMPLING_LEVELS)


class GRPOOutput(NamedTuple):
    """The loss, and what to log of it: scalars without gradient but ``loss``."""

    loss: Tensor
    kl: Tensor | None  # mean divergence from the reference over the tokens
    clip_ratio: Tensor | None  # share of the tokens (sequences, at that level) whose ratio was clipped
    entropy: Tensor | None  # mean over the tokens


def k3_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """An estimate of ``KL(policy || reference)`` from a sample's log-probabilities; never negative.

    Schulman, 2020, http://joschu.net/blog/kl-approx.html, k3.
    """
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio


@torch.no_grad()
def vespo_weights(
    log_ratios: Tensor,  # (B, T)
    advantages: Tensor,  # (B, 1) or (B, T)
    mask: Tensor,  # (B, T)
    options: GRPOOptions,
    importance_sampling_ratio: Tensor | None = None,  # (B, T)
) -> Tensor:
    """(B, 1) weights ``exp(l) w**k exp(-l w)`` of sequences with ratio ``w`` of policy to sampler; 1 where w is 1.

    VESPO, 2026, https://arxiv.org/abs/2602.10693. ``k`` and ``l`` depend on the sign of the advantage.
    """
    lowest = math.log(1e-8)
    log_w = (log_ratios.clamp(-20, 20) * mask).sum(-1, keepdim=True)
    if importance_sampling_ratio is not None:
        log_w = log_w + importance_sampling_ratio.log().clamp(lowest, 20).sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, 20)
    good = advantages >= 0
    k = torch.where(good, options.vespo_k_pos, options.vespo_k_neg)
    decay = torch.where(good, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(0, 0, 0)


def _token_losses(
    logps: Tensor,
    log_ratios: Tensor,
    ratios: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: GRPOOptions,
    importance_sampling_ratio: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Losses of tokens, or where all of them are of whole sequences (B, 1), and which were clipped."""
    if options.loss_type == "cispo":  # MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585
        clipped = (ratios > options.epsilon_high) & (advantages > 0)
        return -ratios.clamp(max=options.epsilon_high).detach() * advantages * logps, clipped
    if options.loss_type == "sapo":  # SAPO, 2025, https://arxiv.org/abs/2511.20347
        temperature = torch.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        return -(temperature * (ratios - 1)).sigmoid() * 4 / temperature * advantages, None
    if options.loss_type == "vespo":
        weights = vespo_weights(log_ratios, advantages, mask, options, importance_sampling_ratio)
        return -weights * advantages * logps, None
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    bounded = ratios.clamp(low, high)
    if options.delta is not None:  # INTELLECT-2, 2025, https://arxiv.org/abs/2505.07291
        ratios = ratios.clamp(max=options.delta)
    clipped = ((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))
    return -torch.min(ratios * advantages, bounded * advantages), clipped


def _reduced(losses: Tensor, mask: Tensor, options: GRPOOptions, num_items: Tensor | float | None) -> Tensor:
    if options.loss_type in ("grpo", "sapo"):
        return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if options.loss_type == "luspo":  # LUSPO, 2026, https://arxiv.org/abs/2602.05261
        return (losses * mask).sum(-1).mean()
    total = (losses * mask).sum()
    if options.loss_type == "dr_grpo":  # Liu et al., 2025, https://arxiv.org/abs/2503.20783
        if options.max_completion_length is None:
            raise ValueError("loss type 'dr_grpo' needs max_completion_length, got None")
        return total / (len(losses) * options.max_completion_length)
    if options.loss_type == "bnpo" or num_items is None:
        num_items = mask.sum()
    # dapo: Yu et al., 2025, https://arxiv.org/abs/2503.14476
    return total / (num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1))


def grpo_loss(
    logps: Tensor,  # (B, T)
    old_logps: Tensor | None,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    options: GRPOOptions = GRPOOptions(),
    *,
    ref_logps: Tensor | None = None,  # (B, T)
    num_items: Tensor | float | None = None,
    importance_sampling_ratio: Tensor | None = None,  # (B, T) or (B, 1)
    entropy: Tensor | None = None,  # (B, T)
    token_mask: Tensor | None = None,  # (B, T)
) -> GRPOOutput:
    """The policy loss of B sampled answers, from their tokens' log-probabilities; formulas as TRL's ``GRPOTrainer``.

    Args:
        logps: (B, T) under the policy.
        old_logps: (B, T) under the policy that sampled; None stands for the policy as it is.
        advantages: (B,), or (B, T).
        mask: (B, T) 1 for the tokens that count.
        options: what kind of loss; ``loss_type`` is one of ``GRPO_LOSS_TYPES``.
        ref_logps: (B, T) under the reference, needed where ``options.beta`` is not 0.
        num_items: what ``dapo``, ``cispo`` and ``vespo`` divide the sum by: the tokens of the whole batch; None takes
            those of ``mask``.
        importance_sampling_ratio: factors that correct for a sampler other than the old policy. ``vespo`` makes them
            part of its weights.
        entropy: (B, T) of the policy, for logging and where ``options.entropy_coef`` is not 0.
        token_mask: (B, T) 0 for tokens whose policy loss and entropy are dropped, but not their divergence.

    Returns:
        :class:`GRPOOutput`. Gradients flow to ``logps`` and, with an entropy coefficient, ``entropy``.

    Raises:
        ValueError: where a type lacks what it needs.
    """
    if options.beta and ref_logps is None:
        raise ValueError(f"beta={options.beta} needs ref_logps, got None")
    if options.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy, got None")
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratios = logps - (logps.detach() if old_logps is None else old_logps)
    log_weights = log_ratios
    if options.importance_sampling_level == "sequence":
        log_weights = (log_ratios * mask).sum(-1, keepdim=True) / lengths
    ratios = log_weights.exp()
    losses, clipped = _token_losses(logps, log_ratios, ratios, advantages, mask, options, importance_sampling_ratio)
    if token_mask is not None:
        losses = losses * token_mask
    if importance_sampling_ratio is not None and options.loss_type != "vespo":
        losses = losses * importance_sampling_ratio

    def mean_of_tokens(x: Tensor, weights: Tensor = mask) -> Tensor:
        return x.mean() if x.shape[1] == 1 != logps.shape[1] else (x * weights).sum() / weights.sum().clamp(min=1)

    kl = None
    if options.beta:
        assert ref_logps is not None
        divergence = k3_divergence(logps, ref_logps)
        if options.use_bias_correction_kl:
            divergence = divergence * ratios
        losses = losses + options.beta * divergence
        kl = mean_of_tokens(divergence.detach())
    loss = _reduced(losses, mask, options, num_items)
    if options.entropy_coef:
        assert entropy is not None
        kept = mask if token_mask is None else mask * token_mask
        loss = loss - options.entropy_coef * mean_of_tokens(entropy, kept)
    return GRPOOutput(
        loss,
        kl,
        None if clipped is None else mean_of_tokens(clipped.to(logps.dtype)),
        None if entropy is None else mean_of_tokens(entropy.detach()),
    )


class LigerFusedLinearGRPOLoss(HeadLoss):
    """:func:`grpo_loss` of a language-model head, whose logits are never built.

    Args:
        beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, delta, use_bias_correction_kl, entropy_coef: of
            :class:`GRPOOptions`. The default of beta is Liger-Kernel's.
        compiled, use_ref_model, chunk_size: as :class:`HeadLoss`.
        temperature: the logits are divided by it, as they were when the answers were sampled.
        options: further fields of :class:`GRPOOptions` (``vespo_...``), and ``logit_scale``, ``softcap``,
            ``tile_bytes``, ``cache_bytes``, ``least_memory``.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        entropy_coef: float = 0.0,
        **options: Any,
    ) -> None:
        further = {each.name: options.pop(each.name) for each in fields(GRPOOptions) if each.name in options}
        super().__init__(
            use_ref_model=use_ref_model and beta != 0,
            compiled=compiled,
            chunk_size=chunk_size,
            temperature=temperature,
            **options,
        )
        self.options = GRPOOptions(
            loss_type=loss_type,
            beta=beta,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            importance_sampling_level=importance_sampling_level,
            max_completion_length=max_completion_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            use_bias_correction_kl=use_bias_correction_kl,
            entropy_coef=entropy_coef,
            **further,
        )

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,) or (B, T)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, T) or (B, 1)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (B, T, r) and (V, r)
        num_items: Tensor | float | None = None,
        token_mask: Tensor | None = None,  # (B, T)
        max_valid: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and what to log of it.

        The weight comes second, as in Liger-Kernel, whose DPO, ORPO, CPO and SimPO modules take it first: name the
        arguments.

        Args:
            _input, lin_weight, bias: the hidden states that predict the tokens, and the head.
            selected_token_ids: (B, T) the tokens.
            attention_mask: (B, T) 1 for those that count; the others take part in no product.
            advantages: (B,), or (B, T).
            ref_per_token_logps: the reference's, else those of ``ref_input``, ``ref_weight``, ``ref_bias``; with
                neither, or without ``use_ref_model``, the divergence is from the policy as it is: 0, with no gradient.
            old_per_token_logps, vllm_is_ratio, num_items, token_mask: the function's ``old_logps``,
                ``importance_sampling_ratio``, ``num_items`` and ``token_mask``.
            low_rank: a pair ``a`` (B, T, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the policy's
                logits, as in :func:`liger_trainer.kernels.linear_log_probs`: a LoRA adapter's, ``a`` being the scaled
                output of its first layer. Both get a gradient. The reference takes none.
            max_valid: an upper bound, known to the host, of the number of labels that are not ignored, as
                :func:`liger_trainer.kernels.linear_log_probs`. Without one the host waits once for the device's count.

        Returns:
            The loss and [the mean divergence, where beta is not 0; the share of clipped tokens, where the type clips],
            without gradient.
        """
        labels = selected_token_ids.masked_fill(attention_mask == 0, self.ignore_index)
        max_valid = self.bound(labels, max_valid)
        policy = self.score(
            _input,
            lin_weight,
            labels,
            bias,
            ("entropy",) if self.options.entropy_coef else (),
            low_rank=low_rank,
            max_valid=max_valid,
        )
        logps = policy.tokens.log_probs
        if ref_per_token_logps is None and self.options.beta:
            reference = (
                None
                if ref_input is None
                else self.score_reference(ref_input, ref_weight, labels, ref_bias, max_valid=max_valid)
            )
            ref_per_token_logps = logps.detach() if reference is None else reference.tokens.log_probs
        output = grpo_loss(
            logps,
            old_per_token_logps,
            advantages,
            attention_mask,
            self.options,
            ref_logps=ref_per_token_logps,
            num_items=num_items,
            importance_sampling_ratio=vllm_is_ratio,
            entropy=policy.tokens.entropy,
            token_mask=token_mask,
        )
        return output.loss, [each for each in (output.kl, output.clip_ratio) if each is not None]
