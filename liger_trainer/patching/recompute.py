"""Cheap activations, rebuilt in the backward pass instead of being kept.

A projection keeps its input for the gradient of its weight. Where that input is the output of a norm or of a gated
activation, a kernel that only moves memory makes it again from tensors that autograd keeps anyway: the residual stream
and the norm's weight, the gate and the up projection. The kernels are deterministic, so that the gradients are the same
bit for bit.

During the forward of a patched model autograd's saved-tensor hooks are set. What is kept passes :meth:`_Region.pack`;
there a tensor that was :func:`rebuildable` becomes a :class:`_Recipe`. Everything else is kept as ever. This works
whatever the projection is (LoRA, a quantised layer, a sharded one). Inside of a checkpointed segment, whose own hooks
are the inner ones, nothing changes: it keeps nothing but its inputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .memory import Trial
from .options import Options
from .recogniser import Finding

__all__ = ["rebuildable", "recognise", "remove"]

KIND = "recompute"


class _Recipe:
    """How a tensor is made again.

    Several projections keep the same input. Once it was made again it stays until as many have had it as have kept it.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], autocast: dict[str, Any]) -> None:
        self.function = function
        self.inputs = inputs
        self.autocast = autocast
        self.uses = 0
        self._left = 0
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        value = self._value
        if value is None:
            with torch.no_grad(), torch.autocast(**self.autocast):
                value = self.function(*(_unpack(each) if type(each) is tuple else each for each in self.inputs))
            self._left = self.uses
        self._left -= 1
        self._value = value if self._left > 0 else None
        return value


def _unpack(packed: tuple[Any, Any]) -> Tensor:
    kept, detail = packed
    if isinstance(kept, _Recipe):
        return kept.value().view(detail)
    if kept._version != detail:  # what autograd checks itself where no hooks are set
        raise RuntimeError(
            f"a tensor of shape {tuple(kept.shape)} that is needed for a gradient was changed in place: "
            f"it is at version {kept._version}, and was kept at version {detail}"
        )
    return kept


@dataclass
class _Offer:
    tensor: weakref.ref[Tensor]
    version: int
    make: Callable[[], _Recipe]
    recipe: _Recipe | None = None


class _Region:
    """One forward, from the outermost patched model's beginning to its end."""

    def __init__(self) -> None:
        self._offers: dict[int, _Offer] = {}
        self._pack = self.pack  # one object, to be known by
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def enter(self) -> None:
        self._hooks.__enter__()

    def leave(self) -> None:
        self._hooks.__exit__()
        self._offers.clear()

    def keeps(self) -> bool:
        """Whether what is kept now comes here: not inside of a checkpointed segment, which keeps nothing."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None and hooks[0] is self._pack

    def offer(self, tensor: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        device = tensor.device.type
        autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }

        def make() -> _Recipe:
            packed = tuple(self.pack(each) if isinstance(each, Tensor) else each for each in inputs)
            return _Recipe(function, packed, autocast)

        self._offers[tensor.data_ptr()] = _Offer(weakref.ref(tensor), tensor._version, make)

    def pack(self, tensor: Tensor) -> tuple[Any, Any]:
        """A recipe and a shape, or the tensor and its version."""
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            offer = self._offers.get(tensor.data_ptr())
            source = None if offer is None else offer.tensor()
            # While the tensor that was offered lives, whatever begins where it does is a view of it.
            if (
                offer is not None
                and source is not None
                and tensor._version == offer.version
                and tensor.dtype == source.dtype
                and tensor.numel() == source.numel()
                and tensor.is_contiguous()
                and source.is_contiguous()
            ):
                if offer.recipe is None:
                    offer.recipe = offer.make()
                offer.recipe.uses += 1
                return offer.recipe, tensor.shape
        # A leaf is kept itself, since frameworks exchange the memory of parameters; anything else without its history,
        # which may lead back to here.
        return (tensor if tensor.is_leaf else tensor.detach()), tensor._version


class _Stack(threading.local):
    def __init__(self) -> None:
        self.regions: list[_Region | None] = []
        self.active: _Region | None = None


_stack = _Stack()


def rebuildable(tensor: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return tensor, which is ``function(*inputs)``, having offered to make it again that way.

    Args:
        tensor: what the function returned.
        function: deterministic and cheap; called without gradients, in the autocast state of now.
        inputs: its arguments. Their tensors are kept as long as the recipe, and should be ones that autograd keeps.
    """
    region = _stack.active
    if region is not None and tensor.requires_grad and region.keeps():
        region.offer(tensor, function, inputs)
    return tensor


def _enter(model: nn.Module, inputs: Any) -> None:
    """A hook before the forward of a patched model."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what is kept
        return
    region = None
    taken = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if torch.is_grad_enabled() and not taken:
        region = _Region()
        region.enter()
        _stack.active = region
    _stack.regions.append(region)


def _leave(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """A hook behind the forward of a patched model, called after an error as well."""
    if torch.compiler.is_compiling() or not _stack.regions:
        return
    region = _stack.regions.pop()
    if region is not None:
        _stack.active = None
        region.leave()


def remove(module: nn.Module) -> None:
    """Take this file's hooks off a module; without effect where there are none."""
    for hooks, hook in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for key in [key for key, each in hooks.items() if each is hook]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


@dataclass(frozen=True)
class _Hooks:
    """A model's forward as a region in which cheap activations are not kept."""

    module: nn.Module = field(repr=False)
    kind: str = KIND
    path: str = ""
    kernel: str = "norms and activations rebuilt"
    checked: tuple[torch.dtype, ...] = ()
    trial: Callable[[int, int], Trial | int] | None = None
    verify: Callable[[], str | None] | None = None

    @property
    def class_name(self) -> str:
        return type(self.module).__name__

    @property
    def in_force(self) -> bool:
        return any(hook is _enter for hook in self.module._forward_pre_hooks.values())

    def apply(self) -> None:
        self.module.register_forward_pre_hook(_enter)
        self.module.register_forward_hook(_leave, always_call=True)

    def revert(self) -> None:
        remove(self.module)


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """The model itself, where ``recompute="cheap"`` is asked for; see :class:`.recogniser.Recogniser`."""
    if options.recompute == "cheap":
        yield _Hooks(model)
