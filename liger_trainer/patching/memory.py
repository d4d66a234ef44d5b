"""What a replacement saves: the tensors that a part keeps for its backward pass, counted without computing anything.

Both forwards run on the meta device, where tensors have sizes and no contents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import whole_shape

__all__ = ["Trial", "bytes_saved", "on_meta"]


@dataclass(frozen=True)
class Trial:
    """A part's forward and its replacement's, with inputs on the meta device."""

    original: Callable[..., Any]
    replacement: Callable[..., Any]
    inputs: Sequence[Tensor]


def bytes_saved(trial: Trial | int) -> int:
    """How many bytes less than the original a replacement keeps from its forward to its backward pass."""
    if isinstance(trial, int):
        return trial
    return _kept(trial.original, trial.inputs) - _kept(trial.replacement, trial.inputs)


def _kept(function: Callable[..., Any], inputs: Sequence[Tensor]) -> int:
    """The bytes of the distinct tensors that autograd keeps of a call of function."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one gets its place
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*leaves)
    del result
    return sum(storage.nbytes() for storage in kept.values())


def on_meta(module: Any, source: nn.Module) -> Any:
    """Give module, a shadow of source, parameters like source's on the meta device."""
    for name, parameter in source.named_parameters(recurse=False):
        shape = whole_shape(parameter)
        dtype = parameter.dtype if parameter.is_floating_point() else torch.bfloat16
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return module
