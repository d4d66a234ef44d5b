"""The forward of a class: what it takes, and functions that stand in for it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

__all__ = ["HiddenFunctionError", "redecorated", "renamed_like", "takes_one_input"]


class HiddenFunctionError(Exception):
    """A decorator does not say what it decorates."""

    def __init__(self) -> None:
        super().__init__("a decorator of its forward hides what it decorates")


def redecorated(forward: Any, change: Callable[[Any], Any]) -> Any:
    """``change(function)`` inside of the decorators that forward has around its function, each of them a copy.

    Raises:
        HiddenFunctionError: a decorator does not hold what it decorates in its closure, once, as ``functools.wraps``
            names it.
    """
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        return change(forward)
    cells = getattr(forward, "__closure__", None) or ()
    holds = [i for i, cell in enumerate(cells) if _contents(cell) is inner]
    if not isinstance(forward, types.FunctionType) or len(holds) != 1:
        raise HiddenFunctionError
    new = redecorated(inner, change)
    closure = tuple(types.CellType(new) if i == holds[0] else cell for i, cell in enumerate(cells))
    copied = types.FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, closure)
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, new)
    return copied


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


def takes_one_input(forward: Callable[..., Any]) -> bool:
    """Whether forward is an undecorated ``forward(self, x)``, without further parameters."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    parameters = list(inspect.signature(forward).parameters.values())
    return len(parameters) == 2 and all(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters
    )


def renamed_like(function: Callable[..., Any], original: Callable[..., Any]) -> Any:
    """Copy function, giving its leading positional parameters the names that they have in original.

    Callers may pass any argument by keyword, and ``inspect.signature`` of a swapped forward must not change. Renaming
    the variables of the code object costs nothing at call time, unlike ``*args, **kwargs``, and a compiler sees an
    ordinary function.

    Args:
        function: a plain function without ``*args`` and ``**kwargs`` none of whose parameters is used in a closure.
        original: a function with at least as many positional parameters.
    """
    code = function.__code__
    names = [parameter.name for parameter in inspect.signature(original).parameters.values()][: code.co_argcount]
    renamed = types.FunctionType(
        code.replace(
            co_varnames=(*names, *code.co_varnames[len(names) :]),
            co_name=original.__name__,
            co_qualname=original.__qualname__,
        ),
        function.__globals__,
        original.__name__,
        function.__defaults__,
        function.__closure__,
    )
    renamed.__qualname__ = original.__qualname__
    renamed.__module__ = original.__module__
    renamed.__doc__ = original.__doc__
    renamed.__annotations__ = dict(original.__annotations__)
    return renamed
