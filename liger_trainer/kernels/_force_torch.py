"""Switches that put an op's torch implementation in its kernel's place: to find out whether a kernel is at fault."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import _library

__all__ = ["TORCH_VARIABLE", "force_from_environment", "forced_ops", "op_names", "use_torch"]

TORCH_VARIABLE = "LIGER_TRAINER_TORCH"
_ALIASES = {"geglu": "gated_activation", "swiglu": "gated_activation"}


def op_names() -> list[str]:
    """The ops by the names that :func:`use_torch` takes, sorted."""
    return sorted({op.family for op in _library.OPS.values()})


def forced_ops() -> list[str]:
    """The ops that the torch implementation serves by request, sorted."""
    return sorted(_library._forced)


def _families(names: Sequence[str], where: str) -> frozenset[str]:
    known = op_names()
    if "all" in names:
        return frozenset(known)
    found = [_ALIASES.get(name, name) for name in names]
    for name in found:
        if name not in known:
            raise ValueError(f"{where}: expected 'all' or names among {', '.join([*known, *_ALIASES])}, got {name!r}")
    return frozenset(found)


@contextmanager
def use_torch(*ops: str) -> Iterator[None]:
    """Compute ops by their torch implementations, whatever device they run on and whatever is registered for it.

    For the whole process and not one thread, since the backward pass runs in threads of autograd's. The ops join those
    that ``LIGER_TRAINER_TORCH`` or an outer ``use_torch`` names. Calls that a tensor subclass, a mode, a profiler or a
    compiled graph takes through PyTorch's dispatcher still find a kernel that another package registered there.

    Args:
        *ops: names of ops, as ``"rms_norm"`` or ``"linear_cross_entropy"``; ``"all"``, or no name, for all of them.
            ``"swiglu"`` and ``"geglu"`` are one op, ``"gated_activation"``.

    Raises:
        ValueError: no op has such a name.
    """
    before = _library._forced
    _library.force(before | _families(ops or ("all",), "use_torch"))
    try:
        yield
    finally:
        _library.force(before)


def force_from_environment() -> None:
    """Read ``LIGER_TRAINER_TORCH``: ``all``, or names of ops with commas between them.

    Raises:
        ValueError: no op has such a name.
    """
    value = os.environ.get(TORCH_VARIABLE, "")
    names = [name.strip() for name in value.split(",") if name.strip()]
    if names:
        _library.force(_families(names, f"{TORCH_VARIABLE}={value!r}"))
