"""Residual additions joined with the norm behind them, in both directions, inside of any layer.

A pre-norm layer adds a block's output to the residual stream and norms the sum; with :func:`.kernels.add_rms_norm` that
is one kernel, and one in the backward. Where it norms what it keeps for later, the backward is one kernel
(:func:`.kernels.rms_norm_and_residual`). Both are found in the source of the layer's own forward
(:mod:`.residual_forward`), so that a layer needs no known name nor shape.

The class of a layer is what wrapping policies, checkpointing and compilers know it by. It stays as it is: the joined
forward is bound on the instance.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .class_swap import stock_class
from .memory import Trial
from .probe import probe_dtypes
from .recogniser import Finding, Skip
from .residual_forward import Joints, RewriteError, joined, joints_of

__all__ = ["KIND", "layers", "remove"]

KIND = "fused_add_rms_norm"


def layers(
    model: nn.Module, norms: Mapping[str, Any], verify: Callable[[str], str | None], check: bool
) -> Iterator[Finding]:
    """Find the layers of model in which one of its norms can be joined with what stands before it.

    Args:
        norms: names in ``model.named_modules()`` of the norms that are replaced by a kernel that can, each with a key
            that norms of one kind share.
        verify: compares that kernel, for one of these names, with an addition and the norm, and says how they differ
            if they do.
        check: whether to compare before all is decided.
    """
    reasons: dict[Any, str | None] = {}
    for path in dict.fromkeys(norm.rpartition(".")[0] for norm in norms):
        module = model.get_submodule(path)
        joints = joints_of(type(module).forward)
        paths = {name: f"{path}.{name}".lstrip(".") for name in joints.names}
        children = list(dict.fromkeys(name for name in joints.names if paths[name] in norms))
        if not children:
            continue
        for name in children if check else ():
            key = norms[paths[name]]
            if key not in reasons:
                reasons[key] = verify(paths[name])
        reason = _obstacle(module) or next(filter(None, (reasons.get(norms[paths[name]]) for name in children)), None)
        if reason is None:
            again = functools.partial(_first_difference, verify, tuple(paths[name] for name in children))
            parameters = [p for name in children for p in module.get_submodule(name).parameters()]
            checked = probe_dtypes(parameters) if check else ()
            yield _Bound(module, path, f"add_rms_norm({_counted(joints, children)})", checked, again)
        else:
            yield Skip(KIND, path, stock_class(module).__name__, reason)


def _first_difference(verify: Callable[[str], str | None], paths: tuple[str, ...]) -> str | None:
    return next(filter(None, map(verify, paths)), None)


def _nothing(batch: int, length: int) -> int:
    return 0


def _counted(joints: Joints, children: Collection[str]) -> str:
    counts = {"added": joints.added, "kept": joints.forked}
    return ", ".join(
        f"{sum(name in children for name in names)} {word}"
        for word, names in counts.items()
        if any(name in children for name in names)
    )


def _obstacle(module: nn.Module) -> str | None:
    bound = vars(module).get("forward")
    if bound is not None and not _is_ours(bound) and not _is_its_own(bound, module):
        return "its forward is set on the instance, as device hooks and kernelize do"
    try:
        joined(type(module).forward)
    except RewriteError as reason:
        return str(reason)
    return None


def _is_ours(bound: Any) -> bool:
    return getattr(getattr(bound, "__func__", None), "_liger_trainer_joined", False)


def _is_its_own(bound: Any, module: nn.Module) -> bool:
    """Whether bound is what module's class gives anyway, as pickles of a bound method leave it behind."""
    return isinstance(bound, types.MethodType) and bound.__func__ is type(module).forward and bound.__self__ is module


@functools.cache
def _forward(stock: Any) -> Any:
    """What is bound on instances of a class with the forward stock."""
    served = {stock: joined(stock)}

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # FSDP2 derives a class of its own, whose forward is another decorator around stock.
        outermost = type(self).forward
        if outermost not in served and not torch.compiler.is_compiling():
            try:
                served[outermost] = joined(outermost)
            except RewriteError:
                served[outermost] = outermost
        return served.get(outermost, outermost)(self, *args, **kwargs)

    forward._liger_trainer_joined = True  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class _Bound:
    """A layer whose instance has the joined forward."""

    module: nn.Module = field(repr=False)
    path: str
    kernel: str
    checked: tuple[torch.dtype, ...]
    verify: Callable[[], str | None] | None
    kind: str = KIND
    trial: Callable[[int, int], Trial | int] | None = _nothing  # time is saved, not memory

    @property
    def class_name(self) -> str:
        return stock_class(self.module).__name__

    @property
    def in_force(self) -> bool:
        return _is_ours(vars(self.module).get("forward"))

    def apply(self) -> None:
        _bind(self.module, _forward(type(self.module).forward))

    def revert(self) -> None:
        remove(self.module)


def _bind(module: nn.Module, forward: Any) -> None:
    module.forward = types.MethodType(forward, module)
    module._replicate_for_data_parallel = types.MethodType(_replicate_for_data_parallel, module)  # type: ignore[method-assign]


# Methods that are bound on an instance are pickled by name, so that a pickle reads as the stock layer.
def _replicate_for_data_parallel(self: nn.Module) -> Any:
    """nn.DataParallel's copy of a layer for another device, whose attributes it shares: bound methods would run on
    the original."""
    replica = type(self)._replicate_for_data_parallel(self)
    _bind(replica, vars(self)["forward"].__func__)
    return replica


def remove(module: nn.Module) -> None:
    """Take what this file has bound off a module; without effect where there is nothing."""
    bound = vars(module).get("forward")
    if bound is not None and (_is_ours(bound) or _is_its_own(bound, module)):
        del module.forward
        vars(module).pop("_replicate_for_data_parallel", None)
