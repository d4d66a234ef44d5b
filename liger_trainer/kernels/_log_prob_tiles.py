"""What log-probabilities make of a tile of logits: statistics of its rows and, with a frozen head, their gradient.

Where a group of ranks holds the head together, the ranks' parts of a row meet between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._log_prob_rows import RowStatistics, log_prob_rows
from ._softmax_loss import RowLoss
from ._vocabulary import Part, row_statistics

__all__ = ["score_tile", "wanted_of"]


def wanted_of(statistics: Sequence[Tensor], wanted: Sequence[bool]) -> RowStatistics:
    """Those of the statistics, in their order, that are wanted."""
    return RowStatistics(*(each if flag else None for each, flag in zip(statistics, wanted)))  # type: ignore[arg-type]


def score_tile(
    logits: Tensor,  # (R, V), or (R, V_r) with a part
    rows: Tensor | None,  # (R,)
    gradient: Tensor | None,
    *,
    part: Part | None,
    labels: Tensor,
    spec: RowLoss,
    statistics: RowStatistics,
    gradient_scale: float,
    use_kernel: bool,
) -> None:
    """Write the statistics of a tile's rows and, given a place for it, the gradient of their log-probabilities."""
    options: dict[str, Any] = {"gradient": gradient, "gradient_scale": gradient_scale, "use_kernel": use_kernel}
    if part is None:
        log_prob_rows(logits, labels, spec, statistics, rows=rows, **options)
        return
    index = slice(None) if rows is None else rows
    labels = labels[index]
    _, entropy, mean_logits, squares, top1 = (each is not None for each in statistics[1:6])
    _, joint = row_statistics(
        logits,
        labels,
        spec,
        part,
        entropy=entropy,
        mean_logits=mean_logits,
        log_sum_sq_probs=squares,
        best=top1,
        use_kernel=use_kernel,
    )
    valid = labels != spec.ignore_index
    if joint.best_class is not None:
        joint = joint._replace(top1=joint.best_class == labels)
    for out, values in zip(statistics[:6], joint[:6]):
        if out is not None and values is not None:
            out[index] = torch.where(valid, values, 0).to(out.dtype)
    if gradient is not None:
        parts: dict[str, Any] = {"first_class": part.first_class, "n_all_classes": part.n_all_classes}
        log_prob_rows(logits, labels, spec, joint, known=True, **parts, **options)
