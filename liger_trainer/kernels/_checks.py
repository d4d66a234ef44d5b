"""Checks of arguments that the ops share: each names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._reduction import REDUCTIONS

__all__ = [
    "check_floating",
    "check_head",
    "check_head_labels",
    "check_labels_in_range",
    "check_loss_options",
    "check_low_rank",
    "check_parameter",
    "check_rows",
    "check_same_device",
    "check_vector",
]


def check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {tensor!r}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}")


def check_same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {device}")


def check_vector(name: str, vector: Tensor | None, length: int, meaning: str) -> None:
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), {meaning}; got {tuple(vector.shape)}")


def check_rows(x: Tensor) -> None:
    """Raise unless x is floating point and has a last dimension."""
    if not x.is_floating_point():
        check_floating(x=x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")


def check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    """Raise unless a parameter is a floating point vector as long as x's rows, on x's device."""
    if parameter.shape == x.shape[-1:] and parameter.device == x.device and parameter.is_floating_point():
        return
    check_floating(**{name: parameter})
    check_vector(name, parameter, x.shape[-1], "x's last dimension")
    check_same_device(x.device, **{name: parameter})


def check_labels_in_range(labels: Tensor, n_classes: int, ignore_index: int) -> None:
    """Raise for labels outside [0, n_classes) that are not ignore_index. Waits for the device to have computed them."""
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_classes))]
    if wrong.numel():
        raise ValueError(
            f"labels must lie in [0, {n_classes}) or be ignore_index={ignore_index}; "
            f"{wrong.numel()} of {labels.numel()} do not, the first of them is {int(wrong[0])}"
        )


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise unless hidden states, a head's weight and its bias fit each other; ``prefix`` is of their names."""
    check_floating(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight})
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must have shape (V, {hidden.shape[-1] if hidden.dim() else '?'}) to match "
            f"{prefix}hidden's {tuple(hidden.shape)}; got {tuple(weight.shape)}"
        )
    check_vector(f"{prefix}bias", bias, weight.shape[0], f"a number a row of {prefix}weight")
    check_same_device(hidden.device, **{f"{prefix}weight": weight, f"{prefix}bias": bias})


def check_low_rank(pair: Any, hidden: Tensor, weight: Tensor, name: str = "low_rank") -> None:
    """Raise unless a low-rank term, (\\*, r) and (V, r), fits a head's hidden states and weight."""
    if pair is None:
        return
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of tensors, (*, r) and (V, r); got {type(pair).__name__}")
    a, b = pair
    check_floating(**{f"{name}[0]": a, f"{name}[1]": b})
    if a.dim() < 1 or a.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name}[0] must have shape ({', '.join(map(str, hidden.shape[:-1]))}, r), hidden's but for the last "
            f"dimension; got {tuple(a.shape)}"
        )
    if b.shape != (weight.shape[0], a.shape[-1]):
        raise ValueError(
            f"{name}[1] must have shape ({weight.shape[0]}, {a.shape[-1]}), weight's rows and {name}[0]'s columns; "
            f"got {tuple(b.shape)}"
        )
    check_same_device(hidden.device, **{f"{name}[0]": a, f"{name}[1]": b})


def check_head_labels(hidden: Tensor, labels: Tensor) -> None:
    """Raise unless labels are class indices, one a hidden state."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, class indices; got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have hidden's shape without its last dimension, {tuple(hidden.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )


def check_loss_options(
    reduction: str, label_smoothing: float, z_loss: float, softcap: float | None, temperature: float
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
