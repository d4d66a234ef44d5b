"""What cross entropy does with a tile of logits: the losses of its rows and, in the logits' place, their gradient.

Where a group of ranks holds the head together, the ranks' parts of a row meet between the two.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._softmax_loss import RowLoss, loss_of_rows, softmax_loss_rows
from ._vocabulary import Part, row_statistics

__all__ = ["FP16_GRADIENT_SCALE", "tile_loss"]

# In fp16 a probability of 1/V is subnormal, and 1/N of it is nothing: gradients of fp16 logits are kept times this, and
# meet the loss's own factor in fp32, in the backward.
FP16_GRADIENT_SCALE = 1024.0


def _loss(
    logits: Tensor,
    rows: Tensor | None,
    gradient: Tensor | None,
    *,
    labels: Tensor,
    scale: Tensor | None,
    **options: Any,
) -> None:
    softmax_loss_rows(logits, labels, rows=rows, gradient=gradient, **_factor(logits, scale), **options)


def _factor(logits: Tensor, scale: Tensor | None) -> dict[str, Any]:
    """What the gradient of the logits is multiplied by."""
    return {"gradient_scale": FP16_GRADIENT_SCALE} if logits.dtype == torch.float16 else {"scale": scale}


def _loss_of_part(
    logits: Tensor,  # (R, V_r)
    rows: Tensor | None,
    gradient: Tensor | None,
    *,
    part: Part,
    labels: Tensor,
    spec: RowLoss,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    scale: Tensor | None,
    lse: Tensor,
    token_loss: Tensor | None = None,
    predicted: Tensor | None = None,
    known_lse: bool = False,
    upstream: Tensor | None = None,
    use_kernel: bool,
) -> None:
    """As ``_loss`` where other ranks have the other classes' logits of the same rows."""
    index = slice(None) if rows is None else rows
    labels = labels[index]
    weights = None if token_weights is None else token_weights[index].to(lse.dtype)
    row_lse = lse[index] if known_lse else None
    if row_lse is None or spec.token_scaling:
        label_z, joint = row_statistics(
            logits,
            labels,
            spec,
            part,
            mean_logits=spec.label_smoothing != 0 and not known_lse,
            best=predicted is not None,
            class_weights=class_weights,
            use_kernel=use_kernel,
        )
        row_lse = joint.lse
        if spec.token_scaling:
            probability = joint.log_probs.exp()
            weights = probability if weights is None else weights * probability
        if token_loss is not None:
            valid = labels != spec.ignore_index
            label_weight: Tensor | float = 1.0
            mean_weight: Tensor | float = 1.0
            if class_weights is not None:
                label_weight = class_weights[labels.clamp(0, part.n_all_classes - 1)].to(lse.dtype)
                mean_weight = class_weights.to(lse.dtype).mean()
            mean_z = row_lse if joint.mean_logits is None else joint.mean_logits
            loss = loss_of_rows(spec, row_lse, label_z, mean_z, label_weight, mean_weight)
            token_loss[index] = torch.where(valid, loss if weights is None else weights * loss, 0)
            lse[index] = torch.where(valid, row_lse, 0)
            if predicted is not None and joint.best_class is not None:
                predicted[index] = torch.where(valid, joint.best_class, -1)
    if gradient is not None:
        softmax_loss_rows(
            logits,
            labels,
            spec._replace(token_scaling=False),
            token_weights=weights,
            class_weights=class_weights,
            lse=row_lse,
            gradient=gradient,
            known_lse=True,
            upstream=upstream if upstream is None or upstream.dim() == 0 else upstream[index],
            first_class=part.first_class,
            n_all_classes=part.n_all_classes,
            use_kernel=use_kernel,
            **_factor(logits, scale),
        )


def tile_loss(part: Part | None, **options: Any) -> Any:
    """What a pass over the tiles does with each."""
    if part is None:
        return functools.partial(_loss, **options)
    return functools.partial(_loss_of_part, part=part, **options)
