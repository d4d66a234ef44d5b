"""Divergences in float64, written with PyTorch's own operations, over logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_divergence(
    student: Tensor,  # (N, V) float64
    teacher: Tensor,  # (N, V) float64
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    token_weights: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> Tensor:
    def log_probs(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
        z = logits * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return (z / temperature).log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    s = log_probs(student, student_logit_scale, student_softcap)
    t = log_probs(teacher, teacher_logit_scale, teacher_softcap)
    if beta in (0, 1):
        loss = kl(t, s) if beta == 0 else kl(s, t)
    else:
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        loss = beta * kl(t, m) + (1 - beta) * kl(s, m)
    valid = torch.ones_like(loss, dtype=torch.bool) if labels is None else labels != -100
    weights = valid.double() if token_weights is None else token_weights.where(valid, 0)
    loss = loss.where(valid, 0) * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (num_items or weights.sum().clamp(min=1e-30))
