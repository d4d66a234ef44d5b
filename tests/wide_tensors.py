"""Finding tensors as wide as the vocabulary in what ran, inside custom ops as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def wide_tensors(vocabulary: int, *, rows: int, hidden_size: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Collect (op, shape) of every tensor that an op met with ``vocabulary`` columns and more than ``rows`` rows.

    The head's transposed weight, (hidden_size, vocabulary), is none of them.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield found
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():  # profile.events() would first make a tree of them, for long
        for shape in event.shapes():
            wide = len(shape) >= 2 and shape[-1] == vocabulary and tuple(shape) != (hidden_size, vocabulary)
            if wide and torch.Size(shape[:-1]).numel() > rows:
                found.append((event.name(), tuple(shape)))
