"""Recognising GELUs that a model computes in several operations, by what they compute.

GPT-2's is eight operations, four of which keep a tensor for the backward pass; PyTorch's own is one, keeps its input,
and rounds once. Whatever a parameterless module of one input is written like, it is one of GELU's two forms if it gives
that form's output and gradients. One that calls PyTorch's operation, and only that, stays as it is.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .class_swap import stock_class
from .forwards import renamed_like, takes_one_input
from .memory import Trial
from .mlp import may_be_gated
from .options import Options
from .probe import Call, Noise, compute_device, difference, fingerprint, probe_dtypes, quiet, shadow
from .recogniser import ClassSwap, Finding, Skip
from .recompute import rebuildable

__all__ = ["recognise"]

KIND = "gelu"
FORMS = ("tanh", "none")  # F.gelu's ``approximate``


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find the GELUs of model; see :class:`liger_trainer.patching.recogniser.Recogniser`."""
    if not options.gelu:
        return
    device = compute_device(list(model.parameters()))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    known: dict[Any, str | None] = {}
    for path, module in model.named_modules():
        if not _may_be_one(module):
            continue
        key = fingerprint(module)
        if key not in known:
            known[key] = _form(module, device, options.check)
        form = known[key]
        if form is None:
            continue
        stock = stock_class(module)
        if places[id(module)] > 1:
            reason = f"it is one object in {places[id(module)]} places, and may have some in other models"
            yield Skip(KIND, path, stock.__name__, reason)
            continue
        width = _width_before(model.get_submodule(path.rpartition(".")[0]))
        yield ClassSwap(
            KIND,
            path,
            f"gelu({form})",
            module,
            functools.partial(_members, stock, form),
            probe_dtypes([]) if options.check else (),
            None if width is None else functools.partial(_trial, module, form, width),
            functools.partial(_verify, module, form, model),
        )


def _may_be_one(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    empty = not module._modules and all(tensor is None for tensor in tensors)
    return empty and "forward" not in vars(module) and takes_one_input(stock_class(module).forward)


def _form(module: nn.Module, device: torch.device, check: bool) -> str | None:
    """The form of GELU that module computes, with more than that operation; None for anything else."""
    with quiet(device):
        for form in FORMS:
            if _disagreement(module, form, device, probe_dtypes([]) if check else (torch.float32,)) is None:
                output = shadow(module)(Noise(device).rows(5, 33, dtype=torch.bfloat16).requires_grad_())
                return None if output.grad_fn.name() == "GeluBackward0" else form
    return None


def _disagreement(module: nn.Module, form: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    copied = shadow(module)
    for dtype in dtypes:
        x = Noise(device).rows(20, 33, dtype=dtype).requires_grad_()
        ours = Call.of(functools.partial(_forward(form), copied), [x])
        for training in (True, False):
            reason = difference(ours, Call.of(copied.train(training).forward, [x]), f"in {dtype}")
            if reason is not None:
                return reason.replace("torch.", "")
    return None


def _verify(module: nn.Module, form: str, model: nn.Module) -> str | None:
    device = compute_device(list(model.parameters()))
    with quiet(device):
        return _disagreement(module, form, device, probe_dtypes([]))


@functools.cache
def _forward(form: str) -> Callable[[Any, Tensor], Tensor]:
    gelu = functools.partial(F.gelu, approximate=form)

    def forward(self: Any, x: Tensor) -> Tensor:
        return rebuildable(gelu(x), gelu, x)

    return forward


@functools.cache
def _members(stock: Any, form: str) -> dict[str, Any]:
    return {"forward": renamed_like(_forward(form), stock.forward)}


def _width_before(parent: nn.Module) -> int | None:
    """The width of the widest projection in ``parent``: what an activation between them is applied to."""
    if may_be_gated(parent):  # of which the activation is a part
        return None
    sizes = [getattr(child, "out_features", getattr(child, "nf", None)) for child in parent.children()]
    return max((size for size in sizes if isinstance(size, int)), default=None)


def _trial(module: nn.Module, form: str, width: int, batch: int, length: int) -> Trial:
    x = torch.empty(batch, length, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    copied = shadow(module)
    return Trial(copied.forward, functools.partial(_forward(form), copied), [x])
