"""Replacing the rotary function that an attention module calls, for that module alone.

Attention forwards call their rotary function by its global name. Replacing the global would change every model of the
type in the process. Instead the module's class gets a forward that differs in one thing: where the code object names
the rotary function it holds a new name, under which the kernel stands in the globals of the original module. The
globals stay the dictionary that they were, since Dynamo looks them up by the module's name and would read the
original's through a copy.

Which function is a rotary one is found by calling it on random queries, keys and tables (:mod:`.rotary_formulas`).
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .class_swap import stock_class
from .forwards import HiddenFunctionError, redecorated
from .memory import Trial
from .options import Options
from .probe import compute_device, probe_dtypes, training_dtype
from .recogniser import ClassSwap, Finding, Skip
from .rotary_formulas import (
    ComplexRotation,
    OneAtATime,
    Rotation,
    bind,
    for_both,
    identify,
    signature_of,
    takes_heads_and_tables,
)

__all__ = ["recognise"]

KIND = "rope"
PREFIX = "_liger_trainer_"


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the rotary functions of model's modules; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not options.rope:
        return
    known: dict[Any, Rotation | ComplexRotation | str] = {}
    for path, module in model.named_modules():
        stock = stock_class(module)
        forward = stock.forward
        undecorated = inspect.unwrap(forward) if callable(forward) else forward
        if not isinstance(undecorated, types.FunctionType):
            continue
        bindings, reasons = [], {}
        for name, function in _called_globals(undecorated):
            signature = signature_of(function)
            named_so = "rotary" in name or "rope" in name
            # Three arguments alone say too little to call a function that is not even called so.
            if signature is None or not (
                named_so or (len(signature.parameters) > 3 and takes_heads_and_tables(signature))
            ):
                continue
            parameters = list(module.parameters())
            where = (compute_device(parameters), training_dtype(parameters), _head_dim(module))
            key = (function, *where)
            if key not in known:
                known[key] = identify(function, signature, *where)
            found = known[key]
            reason = found if isinstance(found, str) else _obstacle(module, forward, undecorated, name)
            if not isinstance(found, str) and reason is None:
                bindings.append((name, function, found))
            elif not isinstance(found, str) or named_so:
                reasons[name] = reason
        if bindings:
            kernel = " or ".join(dict.fromkeys(str(found) for *_, found in bindings))
            members = functools.partial(_members, forward, tuple(bindings))
            checked = probe_dtypes(list(module.parameters()))
            trial = functools.partial(_trial, module, *bindings[0])
            verify = functools.partial(_verify, module, tuple(bindings))
            yield ClassSwap(KIND, path, kernel, module, members, checked, trial, verify)
        for name, reason in reasons.items():
            yield Skip(KIND, path, stock.__name__, f"{name}: {reason}")


def _verify(module: nn.Module, bindings: tuple[tuple[str, Any, Rotation | ComplexRotation], ...]) -> str | None:
    parameters = list(module.parameters())
    for name, function, rotation in bindings:
        signature = signature_of(function)
        assert signature is not None
        found = identify(function, signature, compute_device(parameters), training_dtype(parameters), _head_dim(module))
        if found != rotation:
            return f"{name}: {found} expected, got {rotation}"
    return None


def _called_globals(forward: types.FunctionType) -> list[tuple[str, Any]]:
    names = dict.fromkeys(i.argval for i in dis.get_instructions(forward) if i.opname == "LOAD_GLOBAL")
    return [(name, forward.__globals__[name]) for name in names if name in forward.__globals__]


def _head_dim(module: nn.Module) -> int:
    size = getattr(module, "head_dim", None)
    return size if isinstance(size, int) and size > 0 and size % 4 == 0 else 16


def _obstacle(module: nn.Module, forward: Any, undecorated: types.FunctionType, name: str) -> str | None:
    """Why name can't be bound anew in the forward of module's class."""
    if "forward" in vars(module):
        return "its forward is set on the instance, as device hooks and kernelize do"
    try:
        redecorated(forward, lambda function: function)
    except HiddenFunctionError as reason:
        return str(reason)
    uses = {i.opname for i in dis.get_instructions(undecorated) if i.opcode in dis.hasname and i.argval == name}
    if uses != {"LOAD_GLOBAL"}:
        return f"its forward uses the name {name} for something else as well"
    return None


def _members(forward: Any, bindings: tuple[tuple[str, Any, Rotation | ComplexRotation], ...]) -> dict[str, Any]:
    namespace = inspect.unwrap(forward).__globals__
    names = {name: _new_global(namespace, name, bind(function, found)) for name, function, found in bindings}
    return {"forward": _with_globals(forward, tuple(names.items()))}


def _new_global(namespace: dict[str, Any], name: str, bound: Any) -> str:
    """A name in namespace that stands for bound and, but for what stood there as bound before, for nothing else."""
    for suffix in itertools.count():
        new_name = f"{PREFIX}{name}" + (f"_{suffix}" if suffix else "")
        if namespace.setdefault(new_name, bound) is bound:
            return new_name
    raise AssertionError


@functools.cache
def _with_globals(forward: Any, new_names: tuple[tuple[str, str], ...]) -> Any:
    """A copy of forward, decorators included, on the same globals, whose function reads the second of each pair of
    names where it read the first."""
    new = dict(new_names)

    def renamed(function: types.FunctionType) -> types.FunctionType:
        code = function.__code__
        code = code.replace(co_names=tuple(new.get(name, name) for name in code.co_names))
        copied = types.FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(copied, function)
        del vars(copied)["__wrapped__"]  # a decorator's mark, by which others would unwrap to the original
        return copied

    return redecorated(forward, renamed)


def _trial(
    module: nn.Module, name: str, function: Any, rotation: Rotation | ComplexRotation, batch: int, length: int
) -> Trial | int:
    config, head_dim = getattr(module, "config", None), _head_dim(module)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    of_keys = getattr(config, "num_key_value_heads", None)
    dtype = training_dtype(list(module.parameters()))
    q, k = (
        torch.empty(batch, length, count, head_dim, dtype=dtype, device="meta").transpose(1, 3 - rotation.unsqueeze_dim)
        for count in (heads, of_keys if isinstance(of_keys, int) else heads)
    )
    if isinstance(rotation, ComplexRotation):
        tables = [torch.empty(1, length, head_dim // 2, dtype=torch.complex64, device="meta")]
    else:
        width = head_dim // 2 if rotation.tables == "pairs" else head_dim
        tables = [torch.empty(1, length, width, dtype=dtype, device="meta") for _ in range(2)]
    bound = bind(function, rotation)
    if isinstance(rotation, OneAtATime):
        function, bound = for_both(function), for_both(bound)
    return Trial(function, bound, [q.requires_grad_(), k.requires_grad_(), *tables])
