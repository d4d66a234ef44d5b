"""Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) and its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._sequences import HeadLoss, check_names, logistic_loss

__all__ = [
    "DPO_LOSS_TYPES",
    "F_DIVERGENCES",
    "LigerFusedLinearDPOLoss",
    "dpo_loss",
    "f_divergence_scores",
    "length_desensitized_log_probs",
    "wpo_weights",
]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class _Pairs(NamedTuple):
    """B pairs, all tensors (B,), and the constants of the loss."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen: Tensor  # log-ratios of policy to reference
    rejected: Tensor
    chosen_score: Tensor  # what an f-divergence makes of them
    rejected_score: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    chosen_nll: Tensor | None  # ()
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def margin(self) -> Tensor:
        return self.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_margin(self) -> Tensor:
        """The difference of the scores a token."""
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise ValueError("loss types 'ipo' and 'sigmoid_norm' need chosen_lengths and rejected_lengths, got None")
        return self.chosen_score / self.chosen_lengths - self.rejected_score / self.rejected_lengths


def _exo_pair(pairs: _Pairs) -> Tensor:
    """Ji et al., 2024, https://arxiv.org/abs/2402.00856, eq. 16."""
    log_won, log_lost = F.logsigmoid(pairs.margin), F.logsigmoid(-pairs.margin)
    if not 0 < pairs.label_smoothing < 1:
        raise ValueError(f"loss type 'exo_pair' needs label_smoothing in (0, 1), got {pairs.label_smoothing}")
    won = log_won.exp() * (log_won - math.log1p(-pairs.label_smoothing))
    return won + log_lost.exp() * (log_lost - math.log(pairs.label_smoothing))


def _robust(pairs: _Pairs) -> Tensor:
    """Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409."""
    noise = pairs.label_smoothing
    if noise == 0.5:
        raise ValueError("loss type 'robust' needs a label_smoothing other than 0.5")
    return (logistic_loss(pairs.margin) * (1 - noise) - noise * logistic_loss(-pairs.margin)) / (1 - 2 * noise)


def _nca_pair(pairs: _Pairs) -> Tensor:
    """Chen et al., 2024, https://arxiv.org/abs/2402.05369."""
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return logistic_loss(chosen) + 0.5 * logistic_loss(-chosen) + 0.5 * logistic_loss(-rejected)


def _sppo_hard(pairs: _Pairs) -> Tensor:
    """Wu et al., 2024, https://arxiv.org/abs/2405.00675, with winning probabilities 1 and 0."""
    return (pairs.chosen - 0.5 / pairs.beta).square() + (pairs.rejected + 0.5 / pairs.beta).square()


def _aot(pairs: _Pairs) -> Tensor:
    """Melnyk et al., 2024, https://arxiv.org/abs/2406.05882: margins of policy and reference in their own orders."""
    margins = (pairs.chosen_logps - pairs.rejected_logps).sort(0).values
    ref_margins = (pairs.ref_chosen_logps - pairs.ref_rejected_logps).sort(0).values
    return logistic_loss(pairs.beta * (margins - ref_margins), pairs.label_smoothing)


def _aot_unpaired(pairs: _Pairs) -> Tensor:
    """The same of chosen and rejected log-ratios."""
    margins = pairs.chosen.sort(0).values - pairs.rejected.sort(0).values
    return logistic_loss(pairs.beta * margins, pairs.label_smoothing)


def _apo_down(pairs: _Pairs) -> Tensor:
    """D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, eq. 8."""
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def _discopop(pairs: _Pairs) -> Tensor:
    """Lu et al., 2024, https://arxiv.org/abs/2406.08414, eq. 5."""
    modulation = (pairs.margin / pairs.discopop_tau).sigmoid()
    return logistic_loss(pairs.margin) * (1 - modulation) + (-pairs.margin).exp() * modulation


def _sft(pairs: _Pairs) -> Tensor:
    """The chosen answers' negative log-likelihood a token, the same for every pair."""
    if pairs.chosen_nll is None:
        raise ValueError("loss type 'sft' needs chosen_nll, got None")
    return pairs.chosen_nll.expand(pairs.chosen.shape)


_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": lambda pairs: logistic_loss(pairs.margin),
    # SLiC, Zhao et al., 2023, https://arxiv.org/abs/2305.10425
    "hinge": lambda pairs: torch.relu(1 - pairs.margin),
    # Azar et al., 2023, https://arxiv.org/abs/2310.12036, eq. 17, over means of tokens
    "ipo": lambda pairs: (pairs.mean_margin - 1 / (2 * pairs.beta)).square(),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    # Jung et al., 2024, https://arxiv.org/abs/2404.04656, with a reward shift of 0
    "bco_pair": lambda pairs: logistic_loss(pairs.beta * pairs.chosen) + logistic_loss(-pairs.beta * pairs.rejected),
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    # D'Oosterlinck et al., 2024, eq. 7
    "apo_zero": lambda pairs: 1 - (pairs.beta * pairs.chosen).sigmoid() + (pairs.beta * pairs.rejected).sigmoid(),
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": lambda pairs: logistic_loss(pairs.beta * pairs.mean_margin),
}
DPO_LOSS_TYPES = tuple(_LOSSES)


def f_divergence_scores(
    log_ratios: Tensor,
    divergence: str = "reverse_kl",
    alpha: float = 1.0,
) -> Tensor:
    """What replaces log-ratios of policy to reference when another f-divergence is to hold the two together.

    Wang et al., 2024, https://arxiv.org/abs/2309.16240: f'(u) at the ratio u. ``reverse_kl`` (DPO itself) leaves the
    log-ratios as they are; ``alpha`` is the coefficient of ``alpha_divergence``, at 1 the same as that.
    """
    check_names("divergence", (divergence,), F_DIVERGENCES)
    if divergence == "forward_kl":
        return 1 - (-log_ratios).exp()
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1((log_ratios * (alpha - 1)).clamp(max=80.0)) / (alpha - 1)
    return log_ratios


def length_desensitized_log_probs(
    log_probs: Tensor,  # (2B, T): B chosen, B rejected
    mask: Tensor,  # (2B, T)
    alpha: float,
) -> Tensor:
    """(2B,) sums in which tokens beyond the length of the shorter answer of a pair weigh ``alpha``.

    Liu et al., 2024, https://arxiv.org/abs/2409.06411.
    """
    lengths = mask.sum(-1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    tail = mask.cumsum(-1) > shared.unsqueeze(-1)
    return (log_probs * mask * (1 + (alpha - 1) * tail.to(log_probs.dtype))).sum(-1)


def wpo_weights(
    log_probs: Tensor,  # (2B, T): B chosen, B rejected
    log_sum_sq_probs: Tensor,  # (2B, T)
    mask: Tensor,  # (2B, T)
) -> Tensor:
    """(B,) factors of the pairs' losses by how likely the policy is to have written them, without gradient.

    Zhou et al., 2024, https://arxiv.org/abs/2406.11827, eq. 2, aligned by the sum of the squared probabilities.
    """
    aligned = (log_probs.detach() - log_sum_sq_probs.detach()) * mask
    weights = (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).exp()
    chosen, rejected = weights.chunk(2)
    return chosen * rejected


def dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor | None = None,  # (B,)
    ref_rejected_logps: Tensor | None = None,  # (B,)
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 1.0,
    chosen_lengths: Tensor | None = None,  # (B,)
    rejected_lengths: Tensor | None = None,  # (B,)
    chosen_nll: Tensor | None = None,  # ()
    discopop_tau: float = 0.05,
) -> Tensor:
    """The loss of each of B pairs of answers, from their log-probabilities under policy and reference.

    The formulas are those of TRL's ``DPOTrainer``. With the log-ratios ``r`` of policy to reference, ``sigmoid``, DPO's
    own, is ``-log sigmoid(beta * (r_chosen - r_rejected))``.

    Args:
        chosen_logps, rejected_logps: (B,) sums over the answers' tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) the reference's; None stands for zeros.
        loss_type: one of ``DPO_LOSS_TYPES``.
        beta: above 0; how strongly the policy is held to the reference.
        label_smoothing: the share of labels taken for wrong, by ``exo_pair`` (which needs it above 0), ``robust``,
            ``aot`` and ``aot_unpaired``; the other types don't use it.
        f_divergence, f_alpha: of :func:`f_divergence_scores`.
        chosen_lengths, rejected_lengths: (B,) numbers of tokens, for ``ipo`` and ``sigmoid_norm``.
        chosen_nll: () negative log-likelihood a token of the chosen answers, for ``sft``.
        discopop_tau: of ``discopop``.

    Returns:
        (B,) losses, to be averaged.

    Raises:
        ValueError: for an unknown loss type or divergence, and where a type lacks what it needs.
    """
    check_names("loss_type", (loss_type,), DPO_LOSS_TYPES)
    ref_chosen_logps = torch.zeros_like(chosen_logps) if ref_chosen_logps is None else ref_chosen_logps
    ref_rejected_logps = torch.zeros_like(rejected_logps) if ref_rejected_logps is None else ref_rejected_logps
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return _LOSSES[loss_type](
        _Pairs(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen,
            rejected,
            f_divergence_scores(chosen, f_divergence, f_alpha),
            f_divergence_scores(rejected, f_divergence, f_alpha),
            chosen_lengths,
            rejected_lengths,
            chosen_nll,
            beta,
            label_smoothing,
            discopop_tau,
        )
    )


class LigerFusedLinearDPOLoss(HeadLoss):
    """:func:`dpo_loss` of a language-model head, whose logits are never built.

    Args:
        ignore_index, use_ref_model, average_log_prob, compiled, chunk_size: as :class:`HeadLoss`.
        beta: as the function's.
        compute_nll_loss: add the chosen answers' negative log-likelihood a token.
        loss_type: a type, or several whose losses are added.
        loss_weights: a factor a type; 1 each by default.
        label_smoothing, f_divergence, f_alpha, discopop_tau: as the function's.
        ld_alpha: of :func:`length_desensitized_log_probs`, or None.
        use_weighting: multiply the losses by :func:`wpo_weights`.
        options: ``logit_scale``, ``softcap``, ``temperature``, ``tile_bytes``, ``cache_bytes``, ``least_memory``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str | Sequence[str] = "sigmoid",
        *,
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 1.0,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        discopop_tau: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            compiled=compiled,
            chunk_size=chunk_size,
            **options,
        )
        self.loss_types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        check_names("loss_type", self.loss_types, DPO_LOSS_TYPES)
        check_names("f_divergence", (f_divergence,), F_DIVERGENCES)
        self.loss_weights = [1.0] * len(self.loss_types) if loss_weights is None else list(loss_weights)
        if len(self.loss_weights) != len(self.loss_types):
            raise ValueError(
                f"loss_weights must have one number a loss type, {len(self.loss_types)}; got {len(self.loss_weights)}"
            )
        if ld_alpha is not None and average_log_prob:
            raise ValueError("ld_alpha weighs the tokens of a sum and excludes average_log_prob=True")
        self.compute_nll_loss = compute_nll_loss
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.beta = beta
        self.options = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "f_divergence": f_divergence,
            "f_alpha": f_alpha,
            "discopop_tau": discopop_tau,
        }

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2B, T, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,  # (2B, T, r) and (V, r)
        ref_logps: Tensor | None = None,  # (2B,)
        max_valid: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what to log of it.

        The weight comes first, as in Liger-Kernel, whose KTO and GRPO modules take it second: name the arguments.

        Args:
            lin_weight, _input, target, bias: head, hidden states and labels already shifted; B chosen answers, then
                the B rejected ones in their order.
            ref_input, ref_weight, ref_bias: the reference's, where ``use_ref_model``.
            ref_logps: the reference's log-probabilities of the 2B answers in their place, computed before.
            low_rank: a pair ``a`` (2B, T, r) and ``b`` (V, r) whose product ``a @ b.T`` is added to the policy's
                logits, as in :func:`liger_trainer.kernels.linear_log_probs`: a LoRA adapter's, ``a`` being the scaled
                output of its first layer. Both get a gradient. The reference takes none.
            max_valid: an upper bound, known to the host, of the number of labels that are not ignored, as
                :func:`liger_trainer.kernels.linear_log_probs`. Without one the host waits once for the device's count.

        Returns:
            The loss and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards, rejected_rewards), of which the means are over the labelled tokens and without gradient.
        """
        outputs = ("mean_logits", "log_sum_sq_probs") if self.use_weighting else ("mean_logits",)
        max_valid = self.bound(target, max_valid)
        policy = self.score(_input, lin_weight, target, bias, outputs, low_rank=low_rank, max_valid=max_valid)
        logps = policy.log_probs
        if self.ld_alpha is not None:
            logps = length_desensitized_log_probs(policy.tokens.log_probs, policy.mask, self.ld_alpha)
        if ref_logps is None:
            reference = self.score_reference(ref_input, ref_weight, target, ref_bias, max_valid=max_valid)
            ref_logps = torch.zeros_like(logps) if reference is None else reference.log_probs
            if self.ld_alpha is not None and reference is not None:
                ref_logps = length_desensitized_log_probs(reference.tokens.log_probs, policy.mask, self.ld_alpha)
        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = ref_logps.chunk(2)
        chosen_lengths, rejected_lengths = policy.lengths.chunk(2)
        chosen_mask = policy.mask.chunk(2)[0]
        nll = -(policy.tokens.log_probs.chunk(2)[0] * chosen_mask).sum() / chosen_mask.sum().clamp(min=1)
        losses: Any = 0.0
        for loss_type, weight in zip(self.loss_types, self.loss_weights, strict=True):
            losses = losses + weight * dpo_loss(
                chosen,
                rejected,
                ref_chosen,
                ref_rejected,
                loss_type=loss_type,
                chosen_lengths=chosen_lengths,
                rejected_lengths=rejected_lengths,
                chosen_nll=nll,
                **self.options,  # type: ignore[arg-type]
            )
        if self.use_weighting:
            assert policy.tokens.log_sum_sq_probs is not None
            losses = losses * wpo_weights(policy.tokens.log_probs, policy.tokens.log_sum_sq_probs, policy.mask)
        loss = losses.mean()
        if self.compute_nll_loss:
            loss = loss + nll
        rewards = [self.beta * (each - ref).detach() for each, ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
        return loss, (chosen, rejected, *policy.mean_logits(), nll, *rewards)
