"""Gradients that a forward has formed, waiting for the factors that only the backward knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import define, graph_is_kept
from ._tiles import scaled

__all__ = ["finish"]


def _make_scaled(use_kernel: bool) -> Any:
    def scale_gradient(gradient: Tensor, factor: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return scaled(gradient, factor, dtype, row_scale, in_place=False, use_kernel=use_kernel)

    return scale_gradient


def _make_scaled_in_place(use_kernel: bool) -> Any:
    def scale_gradient_(gradient: Tensor, factor: Tensor | None, row_scale: Tensor | None) -> None:
        scaled(gradient, factor, gradient.dtype, row_scale, in_place=True, use_kernel=use_kernel)

    return scale_gradient_


def _fake_scaled(gradient: Tensor, factor: Tensor | None, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


_scale_gradient = define(
    "linear_cross_entropy_backward(Tensor gradient, Tensor? factor, Tensor? row_scale, ScalarType dtype) -> Tensor",
    kernel=_make_scaled(True),
    reference=_make_scaled(False),
    fake=_fake_scaled,
)
_scale_gradient_ = define(
    "linear_cross_entropy_backward_(Tensor(a!) gradient, Tensor? factor, Tensor? row_scale) -> ()",
    kernel=_make_scaled_in_place(True),
    reference=_make_scaled_in_place(False),
    fake=lambda gradient, factor, row_scale: None,
)


def finish(gradient: Tensor, dtype: torch.dtype | None, factor: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """A gradient that was formed in the forward, times the factors that were still to come, in its final dtype."""
    dtype = gradient.dtype if dtype is None else dtype
    if gradient.dtype == dtype:
        if factor is None and row_scale is None:
            return gradient
        # What nobody will read again is scaled where it lies: a step's memory may well peak here.
        if not graph_is_kept():
            _scale_gradient_(gradient, factor, row_scale)
            return gradient
    return _scale_gradient(gradient, factor, row_scale, dtype)
