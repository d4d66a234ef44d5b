"""Finding large tensors in what ran, inside custom ops as well: as wide as the vocabulary, or new ones of any shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_trainer.kernels._library import OPS


@contextmanager
def wide_tensors(vocabulary: int, *, rows: int, hidden_size: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Collect (op, shape) of every tensor that an op met with ``vocabulary`` columns and more than ``rows`` rows.

    The head's transposed weight, (hidden_size, vocabulary), is none of them.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield found
    found += wide_in(profile, vocabulary, rows=rows, hidden_size=hidden_size)


def wide_in(
    profile: torch.profiler.profile, vocabulary: int, *, rows: int, hidden_size: int
) -> list[tuple[str, tuple[int, ...]]]:
    """What :func:`wide_tensors` collects, of a profile with ``record_shapes`` that is over."""
    found: list[tuple[str, tuple[int, ...]]] = []
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():  # profile.events() would first make a tree of them, for long
        for shape in event.shapes():
            wide = len(shape) >= 2 and shape[-1] == vocabulary and tuple(shape) != (hidden_size, vocabulary)
            if wide and torch.Size(shape[:-1]).numel() > rows:
                found.append((event.name(), tuple(shape)))
    return found


class MadeTensors(TorchDispatchMode):
    """Collects the ``shapes`` of tensors that ops made in memory of their own, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    @property
    def elements(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "liger_trainer" and name in OPS:
            with self:
                return OPS[name].default(*args, **kwargs)
        outputs = func(*args, **kwargs)
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                self.shapes.append(tuple(each.shape))
        return outputs
