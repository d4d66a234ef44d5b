"""What a recogniser is, and what it hands back.

A recogniser names a formula, not a model. It looks at a whole model and returns, for every part that computes its
formula, a :class:`Replacement` that is decided and checked but not yet applied; for every part that looks like it and
is not, a :class:`Skip` with the reason. It changes nothing. Parts that have nothing to do with its formula it passes
over in silence. Widening the patching means adding a recogniser to ``liger_trainer.patching.apply.RECOGNISERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from . import class_swap
from .memory import Trial
from .options import Options

__all__ = ["ClassSwap", "Finding", "Options", "Recogniser", "Replacement", "Skip", "apply_all"]


@dataclass(frozen=True)
class Skip:
    """A part that resembles a known one and is left alone.

    Attributes:
        kind: what it resembles, as ``"rms_norm"``.
        path: its name in ``model.named_modules()``; empty for the model itself.
        class_name: its class.
        reason: why it stays, in words that follow "left alone: ".
    """

    kind: str
    path: str
    class_name: str
    reason: str


class Replacement(Protocol):
    """A part that can be replaced. ``apply`` and ``revert`` may be called any number of times, in turn.

    Attributes:
        kind: the option that governs it, as ``"rms_norm"``.
        path: its name in ``model.named_modules()``; empty for the model itself. At most one replacement per path.
        class_name: the class of the original.
        kernel: what serves instead, in words, as ``"swiglu"``.
        checked: the dtypes in which the replacement was compared with the original, as a kernel in those of training,
            else by its torch implementation; none where it was not.
        trial: what shows the memory that is saved, for a batch size and a length; or None.
        verify: compares them again, on the device where the part is by then; returns how they differ, or None.
    """

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def class_name(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def checked(self) -> tuple[torch.dtype, ...]: ...
    @property
    def trial(self) -> Callable[[int, int], Trial | int] | None: ...
    @property
    def verify(self) -> Callable[[], str | None] | None: ...
    @property
    def in_force(self) -> bool:
        """Whether it is applied now."""
        ...

    def apply(self) -> None:
        """Replace the part. Either succeeds or leaves the part as it was."""
        ...

    def revert(self) -> None:
        """Restore the part exactly; without effect where it is not in force."""
        ...


Finding = Replacement | Skip


class Recogniser(Protocol):
    """Finds the parts of one formula in a model. A module or an object with a ``recognise`` function is one."""

    def recognise(self, model: nn.Module, options: Options) -> Iterable[Finding]:
        """Decide what would be replaced in model under options, changing nothing.

        Whether the options ask for the part at all is decided here, too: without them nothing is returned.
        """
        ...


@dataclass(frozen=True)
class ClassSwap:
    """The replacement that nearly every part needs: its class becomes a subclass with other members.

    Copies of a swapped module are swapped as well, and ``liger_trainer.revert`` finds them by their class, so nothing
    may be kept on the instance.

    Attributes:
        module: the part.
        make_members: returns the members of the subclass by name; called by ``apply``. Equal formulas must give
            identical objects (cache the factory), since a subclass is shared by all modules with equal members.
        checked: the dtypes in which the replacement was compared with the original, as a kernel in those of training,
            else by its torch implementation.
        verify: compares kernel and original again, where the part is by then, and says how they differ if they do.
        trial: makes, for a batch size and a length, what shows the memory that the replacement saves; see
            :class:`liger_trainer.patching.memory.Trial`.
    """

    kind: str
    path: str
    kernel: str
    module: nn.Module = field(repr=False)
    make_members: Callable[[], dict[str, Any]] = field(repr=False)
    checked: tuple[torch.dtype, ...] = ()
    trial: Callable[[int, int], Trial | int] | None = field(default=None, repr=False)
    verify: Callable[[], str | None] | None = field(default=None, repr=False)

    @property
    def class_name(self) -> str:
        return class_swap.stock_class(self.module).__name__

    @property
    def in_force(self) -> bool:
        return class_swap.is_swapped(self.module)

    def apply(self) -> None:
        class_swap.swap(self.module, self.make_members())

    def revert(self) -> None:
        class_swap.unswap(self.module)


def apply_all(replacements: Iterable[Replacement]) -> None:
    """Apply every replacement, or, where one fails, none."""
    applied: list[Replacement] = []
    try:
        for replacement in replacements:
            replacement.apply()
            applied.append(replacement)
    except BaseException:
        for replacement in reversed(applied):
            replacement.revert()
        raise
