"""A head class with a forward of its own: one that starts with the product of a linear layer and goes on from there.

Its forward is not copied. While it runs, the call of :func:`torch.nn.functional.linear` with its own weight gives
deferred logits, and what it does to these is recorded, or builds them, as in its model's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import class_swap
from .forwards import takes_one_input
from .probe import Noise, shadow

__all__ = ["DeferredProduct", "has_own_forward", "with_few_classes"]


class DeferredProduct(TorchFunctionMode):
    """Inside, ``make(input)`` stands for the product of ``input`` with the weight of ``head``."""

    def __init__(self, head: nn.Linear, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._head = head
        self._make = make

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if named["weight"] is self._head.weight and named.get("bias") is self._head.bias:
                return self._make(named["input"])
        return func(*args, **kwargs)


def has_own_forward(head: nn.Module) -> bool:
    """Whether it is a linear layer by its class, whose forward takes the input and is not that of nn.Linear."""
    forward = class_swap.stock_class(head).forward
    return isinstance(head, nn.Linear) and forward is not nn.Linear.forward and takes_one_input(forward)


def with_few_classes(head: nn.Module, n_classes: int, noise: Noise) -> nn.Linear:
    """A copy of ``head`` for so many classes: whatever has an entry or a row a class is random and shorter.

    Its own parameters and buffers are cut to its first classes where they are not random, and those of its children
    are random where they have no values.
    """
    assert isinstance(head, nn.Linear)
    small = shadow(head)
    small.out_features = n_classes
    for name, parameter in head.named_parameters(recurse=False):
        shape = (n_classes, *parameter.shape[1:]) if parameter.shape[:1] == head.weight.shape[:1] else parameter.shape
        small.register_parameter(name, nn.Parameter(noise.normal(*shape, dtype=parameter.dtype)))
    for name, buffer in head.named_buffers(recurse=False):
        small.register_buffer(name, buffer[:n_classes] if buffer.shape[:1] == head.weight.shape[:1] else buffer)
    for child in small.children():
        for name, parameter in child.named_parameters():
            if parameter.is_meta:
                owner = child.get_submodule(name.rpartition(".")[0])
                value = nn.Parameter(noise.normal(*parameter.shape, dtype=parameter.dtype))
                owner.register_parameter(name.rpartition(".")[2], value)
    return small
