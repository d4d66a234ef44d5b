"""Replacing what one module computes by changing its class, so that everything else about it stays.

The class of a module is exchanged for a subclass that overrides a few members. Parameters, buffers, hooks, training
mode, ``state_dict`` keys, ``isinstance`` and the name of the class are untouched, so wrapping policies, saved configs
and quantisers see the module that they know. There is one subclass per original class and set of members: policies
that compare classes by identity then treat all such modules alike, and a compiler guards on one class.

A pickle of a swapped module holds the original class, hence loads where liger_trainer is not installed. A copy of a
swapped module (``copy``, ``copy.deepcopy``) is swapped as well.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["is_swapped", "stock_class", "swap", "unswap"]

_STOCK = "_liger_trainer_stock_class"


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of module, or one that it was derived from since (FSDP2 does so), is a swapped one."""
    return hasattr(type(module), _STOCK)


def stock_class(module: nn.Module) -> Any:  # a type[nn.Module], which mypy takes for unhashable
    """The class that module had before :func:`swap`; its class where it is not swapped."""
    return getattr(type(module), _STOCK, type(module))


def swap(module: nn.Module, members: Mapping[str, Any]) -> None:
    """Make module an instance of the subclass of its class that has members.

    Args:
        module: an instance of an unswapped class.
        members: attributes and methods of the subclass by name; hashable. Pass identical objects for identical
            behaviour, since the subclass is cached by them.

    Raises:
        RuntimeError: module is swapped already.
    """
    if is_swapped(module):
        raise RuntimeError(f"{type(module).__name__} is patched already; revert it first")
    module.__class__ = _subclass(stock_class(module), tuple(sorted(members.items(), key=lambda item: item[0])))


def unswap(module: nn.Module) -> None:
    """Give module its original class back; without effect on a module that is not swapped.

    Raises:
        RuntimeError: another library derived the module's class anew after the swap, so that the original class
            would lose what that library added.
    """
    if not is_swapped(module):
        return
    if _STOCK not in vars(type(module)):
        raise RuntimeError(
            f"the class of a patched {stock_class(module).__name__} was changed to {type(module).__qualname__} after "
            "patching (FSDP2's fully_shard does so), and can't be restored; revert before sharding the model"
        )
    module.__class__ = stock_class(module)


@functools.cache
def _subclass(stock: Any, members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # From protocol 2 on, pickle insists that the object to be built has the class of the one that is pickled.
        reduced: Any = super(swapped, self).__reduce_ex__(min(protocol, 1))
        function, arguments, *rest = reduced
        return (function, tuple(stock if argument is swapped else argument for argument in arguments), *rest)

    def __copy__(self: nn.Module) -> nn.Module:
        function, arguments, state, *_ = __reduce_ex__(self, 4)
        copied = function(*arguments)
        copied.__setstate__(state)
        copied.__class__ = swapped
        return copied

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        inherited = getattr(super(swapped, self), "__deepcopy__", None)
        if inherited is not None:
            copied = inherited(memo)
        else:
            function, arguments, state, *_ = __reduce_ex__(self, 4)
            memo[id(self)] = copied = function(*arguments)
            copied.__setstate__(copy.deepcopy(state, memo))
        copied.__class__ = swapped
        return copied

    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        **dict(members),
        _STOCK: stock,
    }
    swapped: type[nn.Module] = type(stock)(stock.__name__, (stock,), namespace)
    return swapped
