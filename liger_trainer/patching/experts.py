"""Recognising the experts of a mixture whose gate and up projections are one stack of matrices.

transformers runs nearly all experts through one interface: whatever multiplies the matrices (a loop, one grouped
product, one batched product) hands the joint output of gate and up, (S, 2 I), to the module's own ``_apply_gate``. That
method is what is replaced. Every implementation of the products keeps serving, the one chosen in the config or a
third party's, which would not be so if an implementation of our own were registered: that is a choice for the process
and the config, and would show in the config that is saved.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .class_swap import stock_class
from .forwards import renamed_like
from .gated_activations import ACTIVATIONS, Activation
from .memory import Trial
from .options import Options
from .probe import (
    Call,
    Noise,
    compute_device,
    difference,
    fingerprint,
    nearly_bitwise,
    probe_dtypes,
    quiet,
    shadow,
    training_dtype,
)
from .recogniser import ClassSwap, Finding, Skip
from .sharding import whole_shape

__all__ = ["recognise"]

KIND = "experts"

# Implementations of the interface that call ``_apply_gate``.
SERVING = ("grouped_mm", "batched_mm")


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the experts of model; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not options.experts:
        return
    known: dict[Any, tuple[Activation, bool] | str] = {}
    for path, module in model.named_modules():
        if not _are_experts(module):
            continue
        key = fingerprint(module)
        if key not in known:
            known[key] = _identify(module, options.check)
        found = known[key]
        stock = stock_class(module)
        if isinstance(found, str):
            yield Skip(KIND, path, stock.__name__, found)
        else:
            members = functools.partial(_members, stock._apply_gate, *found)
            checked = probe_dtypes(list(module.parameters(recurse=False))) if options.check else ()
            trial = functools.partial(_trial, module, *found)
            verify = functools.partial(_verify, module, *found)
            yield ClassSwap(KIND, path, str(found[0]), module, members, checked, trial, verify)


def _are_experts(module: nn.Module) -> bool:
    """Whether module holds stacks of matrices and, by its interface or its name, is a mixture's experts."""
    stacks = [p for p in module.parameters(recurse=False) if len(whole_shape(p)) == 3]
    named_so = "expert" in stock_class(module).__name__.lower()
    return bool(stacks) and (hasattr(stock_class(module), "_apply_gate") or named_so)


def _identify(module: nn.Module, check: bool) -> tuple[Activation, bool] | str:
    """The activation, and whether the gate is the first half; else why the experts are left alone."""
    obstacle = _obstacle(module)
    if obstacle is not None:
        return obstacle
    parameters = list(module.parameters(recurse=False))
    with quiet(compute_device(parameters)):
        found = _match(module)
        if isinstance(found, str):
            return found
        dtypes = probe_dtypes(parameters) if check else (torch.float32,)
        reasons = []
        for candidate in found:
            reason = next(filter(None, (_disagreement(module, *candidate, dtype) for dtype in dtypes)), None)
            if reason is None:
                return candidate
            reasons.append(reason)
    return reasons[0]


def _obstacle(module: nn.Module) -> str | None:
    stock = stock_class(module)
    # What the interface sets on every module, in all of its versions; has_gate came later.
    if not hasattr(stock, "_apply_gate") or not hasattr(module, "is_transposed"):
        return "does not run through transformers' experts interface"
    if not getattr(module, "has_gate", True):
        return "has no gate"
    if "forward" in vars(module) or "_apply_gate" in vars(module):
        return "its methods are set on the instance"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    loops = implementation in (None, "eager")
    if loops and "_apply_gate" in inspect.unwrap(stock.forward).__code__.co_names:
        return None
    if implementation not in SERVING:
        return (
            f"experts_implementation={implementation or 'eager'!r} applies the gate by itself; choose one of "
            f"{', '.join(SERVING)}"
        )
    return None


def _probe(module: nn.Module, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """module without its matrices, and a joint output of gate and up for its ``_apply_gate``."""
    noise = Noise(compute_device(list(module.parameters(recurse=False))))
    return shadow(module), noise.rows(11, _width(module), dtype=dtype).requires_grad_()


def _width(module: nn.Module) -> int:
    """2 I, the width of gate and up together."""
    stack = getattr(module, "gate_up_proj", None)
    shape = getattr(stack, "ds_shape", getattr(stack, "shape", (1, 96, 96)))
    return int(shape[-1] if getattr(module, "is_transposed", False) else shape[-2])


def _match(module: nn.Module) -> list[tuple[Activation, bool]] | str:
    experts, joint = _probe(module, torch.bfloat16)
    theirs = Call.of(experts._apply_gate, [joint])
    if isinstance(theirs, str):
        return f"its _apply_gate {theirs}, on a probe"
    found = [
        (activation, gate_first)
        for activation in ACTIVATIONS
        for gate_first in (True, False)
        if nearly_bitwise(Call.of(functools.partial(_apply, activation.eager, gate_first), [joint]), theirs)
    ]
    return found or "its _apply_gate computes something else than silu or gelu(gate) * up, which shows in bfloat16"


def _verify(module: nn.Module, activation: Activation, gate_first: bool) -> str | None:
    parameters = list(module.parameters(recurse=False))
    with quiet(compute_device(parameters)):
        each = (_disagreement(module, activation, gate_first, dtype) for dtype in probe_dtypes(parameters))
        return next(filter(None, each), None)


def _disagreement(module: nn.Module, activation: Activation, gate_first: bool, dtype: torch.dtype) -> str | None:
    where = f"in {dtype}".replace("torch.", "")
    experts, joint = _probe(module, dtype)
    ours = Call.of(functools.partial(_apply, activation.fused, gate_first), [joint])
    return difference(ours, Call.of(experts._apply_gate, [joint]), where)


def _apply(activate: Callable[[Tensor, Tensor], Tensor], gate_first: bool, joint: Tensor) -> Tensor:
    first, second = joint.chunk(2, dim=-1)
    return activate(first, second) if gate_first else activate(second, first)


@functools.cache
def _members(original: Any, activation: Activation, gate_first: bool) -> dict[str, Any]:
    activate = activation.fused

    def apply_gate(self: Any, joint: Tensor) -> Tensor:
        return _apply(activate, gate_first, joint)

    return {"_apply_gate": renamed_like(apply_gate, original)}


def _trial(module: nn.Module, activation: Activation, gate_first: bool, batch: int, length: int) -> Trial:
    experts, dtype = shadow(module), training_dtype(list(module.parameters(recurse=False)))
    config = getattr(module, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None) or 1
    joint = torch.empty(batch * length * chosen, _width(module), dtype=dtype, device="meta", requires_grad=True)
    # The down projection keeps what the gate gives; without it that would count for nothing.
    down = nn.Linear(_width(module) // 2, 1, bias=False, device="meta", dtype=dtype)
    ours = functools.partial(_apply, activation.fused, gate_first)
    return Trial(lambda x: down(experts._apply_gate(x)), lambda x: down(ours(x)), [joint])
