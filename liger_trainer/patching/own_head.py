"""A head class with a forward of its own: one that starts with the product of a linear layer and goes on from there.

Its forward is not copied. While it runs, the call of :func:`torch.nn.functional.linear` with its own weight gives
deferred logits, and what it does to these is recorded, or builds them, as in its model's forward.

DeepSpeed's ZeRO-3 puts a function of its own in the place of that one, which no mode of torch's sees. Torch's own is
put back for the time of the head's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..kernels._vocabulary import is_dtensor
from . import class_swap
from .forwards import takes_one_input
from .probe import Noise, shadow
from .sharding import whole_shape

__all__ = ["forward_with_product", "has_own_forward", "reason_against_trial", "with_few_classes"]

_LINEAR = torch._C._nn.linear  # torch.nn.functional.linear, unless another stands there


class _DeferredProduct(TorchFunctionMode):
    """Inside, ``make(input)`` stands for the product of ``input`` with the weight of ``head``."""

    def __init__(self, head: nn.Linear, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._head = head
        self._make = make

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if named["weight"] is self._head.weight and named.get("bias") is self._head.bias:
                return self._make(named["input"])
        return func(*args, **kwargs)


def forward_with_product(
    forward: Callable[..., Any], head: nn.Linear, make: Callable[[Tensor], Any], input: Tensor
) -> Any:
    """``forward(head, input)``, in which ``make(hidden)`` stands for the head's product with ``hidden``."""
    standing = F.linear
    replaced = not torch.compiler.is_compiling() and standing is not _LINEAR
    if replaced:
        F.linear = _LINEAR
    try:
        with _DeferredProduct(head, make):
            return forward(head, input)
    finally:
        if replaced:
            F.linear = standing


def has_own_forward(head: nn.Module) -> bool:
    """Whether it is a linear layer by its class, whose forward takes the input and is not that of nn.Linear."""
    forward = class_swap.stock_class(head).forward
    return isinstance(head, nn.Linear) and forward is not nn.Linear.forward and takes_one_input(forward)


def reason_against_trial(head: nn.Module) -> str | None:
    """Why the forward of ``head`` can't be tried on random numbers, or None."""
    if isinstance(head.weight, nn.Parameter) and len(whole_shape(head.weight)) == 2:
        return None
    return (
        f"the forward of its {type(head).__name__} can't be tried where FSDP1 has its parameters, whose shapes it "
        "hides; patch the model before it is wrapped"
    )


def with_few_classes(head: nn.Module, n_classes: int, noise: Noise) -> nn.Linear:
    """A copy of ``head`` for so many classes: whatever has an entry or a row a class is random and shorter.

    Its own parameters and buffers are cut to its first classes where they are not random, and those of its children
    are random where they have no values, or a part of them only.
    """
    assert isinstance(head, nn.Linear)
    head_classes = whole_shape(head.weight)[:1]
    small = shadow(head)
    small.out_features = n_classes
    for name, parameter in head.named_parameters(recurse=False):
        shape: tuple[int, ...] = whole_shape(parameter)
        shape = (n_classes, *shape[1:]) if shape[:1] == head_classes else shape
        small.register_parameter(name, nn.Parameter(noise.normal(*shape, dtype=parameter.dtype)))
    for name, buffer in head.named_buffers(recurse=False):
        small.register_buffer(name, buffer[:n_classes] if buffer.shape[:1] == head_classes else buffer)
    for child_name, child in head.named_children():
        for name, parameter in child.named_parameters():
            if parameter.is_meta or is_dtensor(parameter) or whole_shape(parameter) != parameter.shape:
                owner = small.get_submodule(f"{child_name}.{name}".rpartition(".")[0])
                value = nn.Parameter(noise.normal(*whole_shape(parameter), dtype=parameter.dtype))
                owner.register_parameter(name.rpartition(".")[2], value)
    return small
