"""Recognising gated MLPs, ``down(activation(gate(x)) * up(x))``, by what they compute.

A gated MLP has three projections as children, or two where gate and up are one projection whose output is halved
(Phi-3), and otherwise nothing but parameterless modules such as its activation. Which projection is which, and which
activation it uses, is found by running its own forward on small random projections: names do not matter, and clamps,
multipliers, inner norms and casts show as a difference in bf16. The replacement calls the projections as modules and
never reads their weights, so that adapters, quantised layers and hooks on them stay in force.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .chunked import chunked
from .class_swap import stock_class
from .forwards import renamed_like, takes_one_input
from .gated_activations import ACTIVATIONS, Activation
from .memory import Trial
from .options import Options
from .probe import (
    Call,
    Noise,
    Replay,
    compute_device,
    difference,
    fingerprint,
    kernels_in,
    nearly_bitwise,
    no_farther,
    probe_dtypes,
    quiet,
    shadow,
    training_dtype,
)
from .recogniser import ClassSwap, Finding, Skip

__all__ = ["may_be_gated", "recognise"]

KIND = "mlp"


@dataclass(frozen=True)
class Roles:
    """Which child is which projection.

    Attributes:
        gate, up: names of the children. Equal where one projection gives both.
        down: name of the child.
        gate_first: for one projection of both, whether the gate is the first half of its output.
        dropout: name of a dropout module before down, or None.
        cast_for_down: whether down's input is cast to the dtype of down's weight, as T5 does, which may keep that in
            fp32. Of a weight that is no tensor, or int8, it is not.
    """

    gate: str
    up: str
    down: str
    gate_first: bool = True
    dropout: str | None = None
    cast_for_down: bool = False

    def run(self, mlp: Any, x: Tensor, activate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The forward of mlp, with ``activate(gate, up)`` between its projections."""
        if self.gate != self.up:
            inner = activate(getattr(mlp, self.gate)(x), getattr(mlp, self.up)(x))
        else:
            first, second = getattr(mlp, self.gate)(x).chunk(2, dim=-1)
            inner = activate(first, second) if self.gate_first else activate(second, first)
        if self.dropout is not None:
            inner = getattr(mlp, self.dropout)(inner)
        down = getattr(mlp, self.down)
        if self.cast_for_down and isinstance(down.weight, Tensor) and down.weight.dtype != torch.int8:
            inner = inner.to(down.weight.dtype)
        return down(inner)


class _DtypeOnly(Tensor):
    """A weight that tells its dtype, and nothing else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func != Tensor.dtype.__get__:  # type: ignore[attr-defined]
            raise AttributeError("a projection's weight, of which no more than its dtype may be read")
        return super().__torch_function__(func, types, args, kwargs or {})


class StubProjection(nn.Module):
    """A random projection of low rank: the cost of a probe does not grow with the product of the two sizes.

    Its ``weight`` has no values, so that a forward which reads them is found out; ``read``: whether it was looked at.
    """

    RANK = 8

    def __init__(self, in_features: int, out_features: int, noise: Noise, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.squeeze = nn.Parameter(noise.normal(in_features, self.RANK, dtype=dtype, scale=in_features**-0.5))
        self.expand = nn.Parameter(noise.normal(self.RANK, out_features, dtype=dtype, scale=self.RANK**-0.5))
        self.read = False

    @property
    def weight(self) -> Tensor:
        self.read = True
        return torch.empty(0, dtype=self.squeeze.dtype).as_subclass(_DtypeOnly)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.squeeze @ self.expand


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the gated MLPs of model; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not options.mlp:
        return
    known: dict[Any, tuple[Roles, Activation] | str] = {}
    for path, module in model.named_modules():
        candidates = _possible_roles(module)
        if not candidates:
            continue
        key = fingerprint(module, frozenset(_projections(module)))
        if key not in known:
            known[key] = _identify(module, candidates, options.check)
        found = known[key]
        stock = stock_class(module)
        if isinstance(found, str):
            yield Skip(KIND, path, stock.__name__, found)
        else:
            tokens = options.mlp_chunk_tokens
            members = functools.partial(_members, stock, *found, tokens)
            checked = probe_dtypes(_parameters(module)) if options.check else ()
            trial = functools.partial(_trial, module, *found, tokens)
            verify = functools.partial(_verify, module, *found)
            yield ClassSwap(KIND, path, _kernel(found[1], tokens), module, members, checked, trial, verify)


def _kernel(activation: Activation, tokens: int | None) -> str:
    if tokens is None:
        return str(activation)
    name, _, form = str(activation).rstrip(")").partition("(")
    return f"{name}({form}{', ' if form else ''}{tokens} tokens at a time)"


def _projections(module: nn.Module) -> dict[str, Any]:
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(getattr(child, "in_features", None), int)
        and isinstance(getattr(child, "out_features", None), int)
    }


def may_be_gated(module: nn.Module) -> bool:
    """Whether the sizes of module's projections are those of a gated MLP."""
    return bool(_possible_roles(module))


def _possible_roles(module: nn.Module) -> list[Roles]:
    """The assignments of roles to module's projections that their sizes allow; none for what is no gated MLP."""
    projections = _projections(module)
    sizes = {name: (child.in_features, child.out_features) for name, child in projections.items()}
    found = []
    if len(sizes) == 3 and takes_one_input(stock_class(module).forward):
        for gate, up, down in itertools.permutations(sizes):
            if sizes[gate] == sizes[up] and sizes[down][0] == sizes[gate][1]:
                found.append(Roles(gate, up, down))
    elif len(sizes) == 2 and takes_one_input(stock_class(module).forward):
        for both, down in itertools.permutations(sizes):
            if sizes[both][1] == 2 * sizes[down][0]:
                found += [Roles(both, both, down, gate_first) for gate_first in (True, False)]
    return found


def _parameters(module: nn.Module) -> list[Tensor]:
    return [p for child in _projections(module).values() for p in child.parameters()]


def _identify(module: nn.Module, candidates: list[Roles], check: bool) -> tuple[Roles, Activation] | str:
    projections = _projections(module)
    if "forward" in vars(module):
        return "its forward is set on the instance, as device hooks and kernelize do"
    if any(True for _ in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))):
        return "has parameters or buffers of its own"
    for name, child in module.named_children():
        if name in projections:
            continue
        if any(True for _ in child.parameters()):
            return f"has a child with parameters ({name}: {type(child).__name__})"
    candidates += [replace(roles, dropout=name) for name in _dropouts(module) for roles in candidates]
    parameters = _parameters(module)
    with quiet(compute_device(parameters)):
        found = _match(module, candidates)
        if isinstance(found, str):
            return found
        # The two forms of GELU are all but equal in bf16; in fp32 one of them is wrong.
        dtypes = probe_dtypes(parameters) if check else (torch.float32,)
        reasons = []
        for roles, activation in found:
            reason = next(filter(None, (_disagreement(module, roles, activation, dtype) for dtype in dtypes)), None)
            if reason is None:
                return roles, activation
            reasons.append(reason)
    return reasons[0]


def _dropouts(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, nn.modules.dropout._DropoutNd)]


def _probe(
    module: nn.Module, roles: Roles, dtype: torch.dtype, down_dtype: torch.dtype | None = None
) -> tuple[Any, Tensor]:
    """module with random projections of dtype, down's perhaps of another, and an input for it."""
    projections = _projections(module)
    noise = Noise(compute_device(_parameters(module)))
    mlp = shadow(
        module,
        {
            name: StubProjection(
                child.in_features, child.out_features, noise, (name == roles.down and down_dtype) or dtype
            )
            for name, child in projections.items()
        },
    )
    for name in _dropouts(module):
        getattr(mlp, name).p = 0.5  # where it stands shows only where it drops
    return mlp, noise.rows(2, 5, projections[roles.gate].in_features, dtype=dtype).requires_grad_()


def _match(module: nn.Module, candidates: list[Roles]) -> list[tuple[Roles, Activation]] | str:
    """The roles and activations that give module's bf16 output bit for bit, for projections of our own."""
    mlp, x = _probe(module, candidates[0], torch.bfloat16)
    replay = Replay(x.device)

    def call(function: Callable[[Tensor], Tensor], training: bool) -> Call | str:
        mlp.train(training)
        return Call.of(replay(function), [x])

    theirs = {training: call(mlp.forward, training) for training in (True, False)}
    for each in theirs.values():
        if isinstance(each, str):
            return f"its forward {each}, on a probe"
    read = [name for name in _projections(module) if getattr(mlp, name).read]
    if read:
        candidates = [replace(roles, cast_for_down=True) for roles in candidates if [roles.down] == read]
    found = []
    for roles, activation in itertools.product(candidates, ACTIVATIONS):
        ours = functools.partial(roles.run, mlp, activate=activation.eager)
        if all(nearly_bitwise(call(ours, training), their) for training, their in theirs.items()):
            found.append((roles, activation))
    return found or "computes something else than down(silu or gelu(gate(x)) * up(x)), which shows in bfloat16"


def _verify(module: nn.Module, roles: Roles, activation: Activation) -> str | None:
    parameters = _parameters(module)
    with quiet(compute_device(parameters)):
        each = (_disagreement(module, roles, activation, dtype) for dtype in probe_dtypes(parameters))
        return next(filter(None, each), None)


def _disagreement(module: nn.Module, roles: Roles, activation: Activation, dtype: torch.dtype) -> str | None:
    found = _difference(module, roles, activation, dtype, dtype)
    if found is None and roles.cast_for_down:
        found = _difference(module, roles, activation, dtype, torch.float32)
    return found


def _difference(
    module: nn.Module, roles: Roles, activation: Activation, dtype: torch.dtype, down_dtype: torch.dtype
) -> str | None:
    where = f"in {dtype}".replace("torch.", "")
    mlp, x = _probe(module, roles, dtype, down_dtype)
    forward, replay = _forward(roles, activation), Replay(x.device)
    weights = list(mlp.parameters())
    with kernels_in(dtype, training_dtype(_parameters(module))):
        ours = Call.of(replay(functools.partial(forward, mlp)), [x], weights)
    reason = difference(ours, Call.of(replay(mlp.forward), [x], weights), where)
    if reason is not None and activation.written_out and dtype != torch.float32:
        # Each operation rounds, and what is left of a small number is its rounding.
        mlp.eval()
        exact = _probe(module, roles, dtype, down_dtype)[0].eval().double()  # the same numbers
        calls = (
            Call.of(function, [inputs], list(each.parameters()))
            for function, inputs, each in (
                (functools.partial(forward, mlp), x, mlp),
                (mlp.forward, x, mlp),
                (exact.forward, x.detach().double().requires_grad_(), exact),
            )
        )
        return None if no_farther(*calls) else reason
    return reason


@functools.cache
def _forward(roles: Roles, activation: Activation) -> Callable[[Any, Tensor], Tensor]:
    activate = activation.fused

    def forward(self: Any, x: Tensor) -> Tensor:
        return roles.run(self, x, activate)

    return forward


def _served(roles: Roles, activation: Activation, tokens: int | None) -> Callable[[Any, Tensor], Tensor]:
    forward = _forward(roles, activation)
    return forward if tokens is None else chunked(forward, tokens)


@functools.cache
def _members(stock: Any, roles: Roles, activation: Activation, tokens: int | None) -> dict[str, Any]:
    return {"forward": renamed_like(_served(roles, activation, tokens), stock.forward)}


def _trial(
    module: nn.Module, roles: Roles, activation: Activation, tokens: int | None, batch: int, length: int
) -> Trial:
    projections = _projections(module)
    dtype = training_dtype(_parameters(module))
    mlp = shadow(
        module,
        {
            name: nn.Linear(child.in_features, child.out_features, bias=False, device="meta", dtype=dtype)
            for name, child in projections.items()
        },
    )
    size = projections[roles.gate].in_features
    x = torch.empty(batch, length, size, dtype=dtype, device="meta", requires_grad=True)
    return Trial(mlp.forward, functools.partial(_served(roles, activation, tokens), mlp), [x])
