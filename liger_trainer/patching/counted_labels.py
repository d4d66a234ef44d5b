"""Labels that know, without asking the device, how many of them can count.

The fused head drops rows whose label is ignored, and the host must know how many are left to choose its tiles. Asked
at the head, the device would first have to finish the whole forward. So the count starts on its way to the host when
the labels enter the model, and travels with them through the few operations that select and pad labels; every other
operation forgets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CountedLabels", "count_labels"]


class _PendingCount:
    __slots__ = ("event", "ignore_index", "value")

    def __init__(self, labels: Tensor, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.value = (labels != ignore_index).sum().to("cpu", non_blocking=True)
        self.event = None
        if labels.device.type != "cpu":
            self.event = torch.Event(labels.device)
            self.event.record()

    def wait(self) -> int:
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        return int(self.value)


class CountedLabels(Tensor):
    """Integer labels with a pending upper bound of how many differ from an ignore index."""

    _pending: _PendingCount

    def upper_bound(self, ignore_index: int) -> int | None:
        """How many labels differ from ignore_index at most, or None if that was counted for another index."""
        return self._pending.wait() if ignore_index == self._pending.ignore_index else None

    def plain(self) -> Tensor:
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not (isinstance(args[0] if args else None, CountedLabels) and isinstance(result, Tensor)):
            return result
        source: CountedLabels = args[0]
        if _adds_no_label(func, source._pending.ignore_index, args[1:], kwargs) and result.dtype == source.dtype:
            result = result.as_subclass(cls)
            result._pending = source._pending
        return result


_SELECTING = frozenset({Tensor.contiguous, Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.to, Tensor.narrow})


def _adds_no_label(func: Callable[..., Any], ignore_index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every element of func's result is an element of the labels, none of them twice, or is ignored."""
    if func is Tensor.__getitem__:
        items = args[0] if isinstance(args[0], tuple) else args
        return all(isinstance(item, (int, slice, type(Ellipsis))) for item in items)
    if func is F.pad:
        return kwargs.get("mode", "constant") == "constant" and kwargs.get("value") == ignore_index
    return func in _SELECTING


def count_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Start counting the labels that are not ignored; nothing waits for it here."""
    if torch.compiler.is_compiling() or isinstance(labels, CountedLabels) or labels.is_floating_point():
        return labels
    counted = labels.as_subclass(CountedLabels)
    counted._pending = _PendingCount(labels, ignore_index)
    return counted
