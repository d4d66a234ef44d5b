"""Heads, hidden states and labels of pairs, their logits in plain PyTorch, and just enough of a TRL trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

T, H, V = 7, 12, 53
TILES = {"tile_bytes": 3 * V * 8, "cache_bytes": 4 * V * 8}  # of float64: one kept, two and more recomputed


class Head(NamedTuple):
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)

    @property
    def leaves(self) -> list[Tensor]:
        return [each for each in self if each.requires_grad]

    def logits(self) -> Tensor:
        return F.linear(*self)

    def fused(self, labels: Tensor) -> SimpleNamespace:
        """What a model with TRL's fused head returns for labels already shifted."""
        log_p = self.logits().log_softmax(-1)
        mask = labels != -100
        safe = labels.clamp(min=0)
        return SimpleNamespace(
            log_probs=log_p.gather(-1, safe.unsqueeze(-1)).squeeze(-1) * mask,
            entropy=-(log_p.exp() * log_p).sum(-1) * mask,
            log_sum_sq_probs=(2 * log_p).logsumexp(-1) * mask,
            mean_logits=self.logits().mean(-1) * mask,
            is_top1=(log_p.argmax(-1) == safe) & mask,
        )


def make_head(batch: int, seed: int = 0, *, trained: bool = True) -> Head:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, T, H), (V, H), (V,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Head(*(each.mul_(0.7).requires_grad_(trained) for each in tensors))


def make_labels(batch: int, seed: int = 0) -> Tensor:
    """(B, T) labels already shifted: a prompt of two tokens, then answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (batch, T), generator=generator)
    labels[:, :2] = -100
    for row in range(batch):
        labels[row, T - row * 7 // 3 % 3 :] = -100
    return labels


class OneProcess:
    """What the losses use of an accelerator, for one process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather_for_metrics(self, x: Tensor) -> Tensor:
        return x

    gather = gather_for_metrics

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def stub_trainer(**attributes: object) -> SimpleNamespace:
    """A stand-in for ``self`` in the methods of TRL's trainers that compute a loss."""
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": OneProcess(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**common, **attributes})


def assert_same_loss(ours: Tensor, theirs: Tensor, head: Head, **tolerances: float) -> None:
    """Losses agree, and so do their gradients for everything in the head."""
    tolerances = tolerances or {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(ours, theirs, **tolerances)
    gradients = (torch.autograd.grad(each, head.leaves, retain_graph=True) for each in (ours, theirs))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, **tolerances)
