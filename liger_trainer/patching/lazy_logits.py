"""The logits of an evaluation: a tensor to whoever looks at it, built when it is read.

A Trainer that evaluates hands every output of the model on, and reads only what its metrics ask for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .deferred_logits import DeferredLogits

__all__ = ["LazyLogits", "settle"]

_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_nested",
    )
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}
_METADATA |= {torch.is_floating_point, torch.is_complex}  # which FSDP2 asks before it casts a model's outputs

_RECORDED = frozenset(
    {Tensor.float, Tensor.contiguous, Tensor.view, Tensor.reshape, Tensor.__getitem__, Tensor.argmax, torch.argmax}
)


class LazyLogits(Tensor):
    """Logits of an evaluation, built when something reads more of them than shape, dtype or device."""

    _deferred: DeferredLogits

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> LazyLogits:
        lazy = Tensor._make_wrapper_subclass(cls, deferred.shape, dtype=deferred.dtype, device=deferred.device)
        lazy._deferred = deferred
        return lazy

    def materialize(self) -> Tensor:
        with torch.no_grad():
            return self._deferred.materialize()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.cross_entropy and isinstance(args[0], LazyLogits):
            deferred = args[0]._deferred  # whose weight the loss lets go of
            return func(deferred._replace(head=copy.copy(deferred.head)), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            if func in _RECORDED and isinstance(args[0], LazyLogits):
                # accelerate casts what a model returns under mixed precision, read or not; metrics and losses of the
                # user's own cut and reshape it, for cross entropy or the likeliest class.
                result = getattr(args[0]._deferred, func.__name__)(*args[1:], **(kwargs or {}))
                return LazyLogits(result) if isinstance(result, DeferredLogits) else result
            return func(*_built(args), **_built(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_built(args), **_built(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())


def _built(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.materialize()
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_built(each) for each in value)
    if isinstance(value, dict):
        return {key: _built(each) for key, each in value.items()}
    return value


def settle(outputs: Any) -> Any:
    """Make a forward's outputs fit to leave the model.

    In a recorded forward, deferred logits stay as they are: frameworks traverse them. Without grad mode they become
    :class:`LazyLogits`, or, inside a compiled graph, logits.
    """
    if torch.is_grad_enabled():
        return outputs
    if isinstance(outputs, DeferredLogits):
        return outputs.materialize() if torch.compiler.is_compiling() else LazyLogits(outputs)
    if isinstance(outputs, dict):
        for key, value in outputs.items():
            if isinstance(value, DeferredLogits):
                outputs[key] = settle(value)
        return outputs
    if type(outputs) is tuple:
        return tuple(settle(each) for each in outputs)
    return outputs
