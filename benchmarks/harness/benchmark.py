"""What a benchmark of an op declares: its inputs, its reference, who provides it, and the problems to measure."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Benchmark",
    "Case",
    "Inputs",
    "Op",
    "Provider",
    "Sweep",
    "UnavailableError",
    "as_tuple",
    "gradients",
    "make_step",
    "randn",
]

Outputs = Tensor | tuple[Tensor, ...]
Op = Callable[..., Outputs]


class UnavailableError(Exception):
    """A provider that can't run here, or can't run this case; the message says why."""


class Case:
    """One problem: sizes by name, and the dtype of its floating point tensors."""

    def __init__(self, dtype: str = "bfloat16", **sizes: int | float) -> None:
        self.dtype = dtype
        self.sizes = sizes

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["sizes"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Case) and (self.dtype, self.sizes) == (other.dtype, other.sizes)

    def __hash__(self) -> int:
        return hash((self.dtype, *sorted(self.sizes.items())))

    def __str__(self) -> str:
        sizes = (name if size is True else f"{name} {size}" for name, size in self.sizes.items())
        return ", ".join([*sizes, self.dtype])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Inputs:
    """An op's arguments; those that require a gradient get one. ``grad_outputs`` is None for a loss, whose is 1."""

    args: tuple[Any, ...]
    grad_outputs: tuple[Tensor, ...] | None = None

    def tensors(self) -> list[Tensor]:
        return [each for each in (*self.args, *(self.grad_outputs or ())) if isinstance(each, Tensor)]

    def differentiable(self) -> list[Tensor]:
        return [each for each in self.args if isinstance(each, Tensor) and each.requires_grad]

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs with f applied to the values of each floating point tensor."""

        def applied(each: Any) -> Any:
            if not isinstance(each, Tensor) or not each.is_floating_point():
                return each
            return f(each.detach()).requires_grad_(each.requires_grad)

        grads = None if self.grad_outputs is None else tuple(applied(each) for each in self.grad_outputs)
        return Inputs(tuple(applied(each) for each in self.args), grads)


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation of an op.

    ``build`` gets the case and returns the op, importing what it needs; it raises :class:`UnavailableError` where it
    can't. ``requires`` names the modules that must be importable, ``environment`` the variables that must be set before
    they are (the provider then gets a process of its own). ``overwrites`` says that the op writes to its arguments or
    to the gradients handed to it; they are put back before each timed call. ``note`` goes into the table.
    """

    build: Callable[[Case], Op]
    requires: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    overwrites: bool = False
    note: str = ""

    def check_requirements(self) -> None:
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                raise UnavailableError(f"{module} is not installed")


@dataclass(frozen=True)
class Sweep:
    """Cases along one size, drawn as one plot; ``size`` is its name in the cases."""

    name: str
    title: str
    size: str
    label: str
    cases: Sequence[Case]
    providers: tuple[str, ...] = ()  # all of them if empty


@dataclass(frozen=True)
class Benchmark:
    """One op: how it is called, what it must compute, and against what floor its time is held.

    ``floor_bytes`` is what any implementation has to move through memory forward and backward; the floor is the time of
    a copy of as many. ``floor_ms(case, device, budget_ms)`` measures another floor in its place. ``about`` is Markdown.
    """

    name: str
    title: str
    about: str
    make_inputs: Callable[[Case, torch.device, torch.Generator], Inputs]
    reference: Op
    providers: Mapping[str, Provider]
    tiny: Case
    bars: Sequence[Case]
    sweeps: Sequence[Sweep] = ()
    floor_bytes: Callable[[Case], int] | None = None
    floor_ms: Callable[[Case, torch.device, float], float] | None = None
    plain: str | None = None  # the provider against whose peak memory the others' is shown
    device_graphs: bool = True  # whether to measure device time: pointless for calls of tens of milliseconds

    def inputs(self, case: Case, device: torch.device, seed: int = 0) -> Inputs:
        return self.make_inputs(case, device, torch.Generator(device).manual_seed(seed))

    def jobs(self, shapes: str, providers: Sequence[str] | None = None) -> list[tuple[Case, str]]:
        """Case and provider of each row, each once: ``shapes`` is tiny, bars (tiny included), sweeps or all."""
        found: dict[tuple[Case, str], None] = {}
        for case in [self.tiny] if shapes != "sweeps" else []:
            found |= {(case, name): None for name in self.providers}
        for case in self.bars if shapes in ("bars", "all") else []:
            found |= {(case, name): None for name in self.providers}
        for sweep in self.sweeps if shapes in ("sweeps", "all") else []:
            for case in sweep.cases:
                found |= {(case, name): None for name in sweep.providers or self.providers}
        return [job for job in found if providers is None or job[1] in providers]


def randn(generator: torch.Generator, case: Case, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    """Normal numbers in the case's dtype, on the generator's device."""
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=case.torch_dtype)
    return x.mul_(scale).requires_grad_(grad)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    """The gradients that flow into the outputs, in their dtypes."""
    if inputs.grad_outputs is None:
        return tuple(torch.ones_like(each) for each in outputs)
    return tuple(grad.to(each.dtype) for grad, each in zip(inputs.grad_outputs, outputs, strict=True))


def make_step(op: Op, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the op forward and backward, returning the gradients.

    The outputs' gradients are made here, once: the step times neither their making nor any accumulation.
    """
    grads = gradients(as_tuple(op(*inputs.args)), inputs)
    wrt = inputs.differentiable()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_tuple(op(*inputs.args)), wrt, grads)

    return step
