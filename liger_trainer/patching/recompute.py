"""Cheap activations, rebuilt in the backward pass instead of being kept.

A projection keeps its input for the gradient of its weight. Where that input is the output of a norm or of a gated
activation, a kernel that only moves memory makes it again from tensors that autograd keeps anyway: the residual stream
and the norm's weight, the gate and the up projection. The kernels are deterministic, so that the gradients are the same
bit for bit.

During the forward of a patched model autograd's saved-tensor hooks are set. What is kept passes :meth:`_Region.pack`;
there a tensor that was :func:`rebuildable` becomes a :class:`_Recipe`, and so do some of its rows, which a chunk of an
MLP keeps, and its copies in another dtype, which autocast makes for every projection. Everything else is kept as ever.
This works whatever the projection is (LoRA, a quantised layer, a sharded one). Inside of a checkpointed segment, whose
own hooks are the inner ones, nothing changes: it keeps nothing but its inputs.
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


@dataclass(frozen=True)
class _Piece:
    """Which elements of a value, in memory order, are kept, and in what shape and dtype."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, value: Tensor) -> Tensor:
        return value.view(-1)[self.start : self.start + self.shape.numel()].view(self.shape).to(self.dtype)


def _unpack(packed: tuple[Any, Any]) -> Tensor:
    kept, detail = packed
    if isinstance(kept, _Recipe):
        return detail.of(kept.value())
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
    node: Any  # held, so that no other one gets its id
    make: Callable[[], _Recipe]
    recipe: _Recipe | None = None

    def source(self) -> Tensor | None:
        """The tensor that was offered, where it is still what it was."""
        source = self.tensor()
        return source if source is not None and source._version == self.version and source.is_contiguous() else None


class _Region:
    """One forward, from the outermost patched model's beginning to its end.

    Attributes:
        norms_only: whether nothing but outputs of norms is made again.
    """

    def __init__(self, norms_only: bool) -> None:
        self.norms_only = norms_only
        self._offers: dict[int, _Offer] = {}
        self._by_node: dict[int, _Offer] = {}
        self._pack = self.pack  # one object, to be known by
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def enter(self) -> None:
        self._hooks.__enter__()

    def leave(self) -> None:
        self._hooks.__exit__()
        self._offers.clear()
        self._by_node.clear()

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

        offer = _Offer(weakref.ref(tensor), tensor._version, tensor.grad_fn, make)
        self._offers[tensor.data_ptr()] = self._by_node[id(tensor.grad_fn)] = offer

    def pack(self, tensor: Tensor) -> tuple[Any, Any]:
        """A recipe and a piece of its value, or the tensor and its version."""
        if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous():
            offer, piece = self._view(tensor) or self._cast(tensor) or (None, None)
            if offer is not None:
                if offer.recipe is None:
                    offer.recipe = offer.make()
                offer.recipe.uses += 1
                return offer.recipe, piece
        # A leaf is kept itself, since frameworks exchange the memory of parameters; anything else without its history,
        # which may lead back to here.
        return (tensor if tensor.is_leaf else tensor.detach()), tensor._version

    def _view(self, tensor: Tensor) -> tuple[_Offer, _Piece] | None:
        """The offer that tensor is, or some of whose consecutive elements it is."""
        # While the tensor that was offered lives, whatever begins where it does is a view of it.
        whole = tensor if tensor._base is None else tensor._base
        offer = self._offers.get(tensor.data_ptr()) or self._offers.get(whole.data_ptr())
        source = None if offer is None else offer.source()
        if offer is None or source is None or tensor._version != offer.version or tensor.dtype != source.dtype:
            return None
        start = int(tensor.storage_offset() - source.storage_offset())
        if not 0 <= start <= source.numel() - tensor.numel():
            return None
        if tensor.numel() != source.numel() and tensor.shape[-1:] != source.shape[-1:]:
            return None  # not of whole rows: what asks for it may ask for little, at the price of all
        return offer, _Piece(start, tensor.shape, tensor.dtype)

    def _cast(self, tensor: Tensor) -> tuple[_Offer, _Piece] | None:
        """The offer that tensor is a copy of in another dtype, as its history says."""
        if tensor._version != 0 or tensor.grad_fn is None:
            return None
        node = _through(tensor.grad_fn, _SHAPES)
        if node is None or node.name() != "ToCopyBackward0":
            return None
        offer = self._by_node.get(id(_through(node.next_functions[0][0], _SHAPES, self._by_node)))
        source = None if offer is None else offer.source()
        if offer is None or source is None or source.numel() != tensor.numel() or source.device != tensor.device:
            return None
        return offer, _Piece(0, tensor.shape, tensor.dtype)


_SHAPES = frozenset({"ViewBackward0", "UnsafeViewBackward0"})


def _through(node: Any, names: frozenset[str], until: Any = ()) -> Any:
    """The first node on the way from node back that is none of these, or is in until by its id."""
    while id(node) not in until and node is not None and node.name() in names:
        node = node.next_functions[0][0]
    return node


class _Stack(threading.local):
    def __init__(self) -> None:
        self.regions: list[_Region | None] = []
        self.active: _Region | None = None


_stack = _Stack()


def rebuildable(tensor: Tensor, function: Callable[..., Tensor], *inputs: Any, norm: bool = False) -> Tensor:
    """Return tensor, which is ``function(*inputs)``, having offered to make it again that way.

    Args:
        tensor: what the function returned.
        function: deterministic and cheap; called without gradients, in the autocast state of now.
        inputs: its arguments. Their tensors are kept as long as the recipe, and should be ones that autograd keeps.
        norm: whether the function is a norm, which is as wide as the residual stream, hence the cheapest.
    """
    region = _stack.active
    if region is not None and tensor.requires_grad and (norm or not region.norms_only) and region.keeps():
        region.offer(tensor, function, inputs)
    return tensor


def _enter(model: nn.Module, inputs: Any, norms_only: bool = False) -> None:
    """A hook before the forward of a patched model."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what is kept
        return
    region = None
    taken = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if torch.is_grad_enabled() and not taken:
        region = _Region(norms_only)
        region.enter()
        _stack.active = region
    _stack.regions.append(region)


def _enter_for_norms(model: nn.Module, inputs: Any) -> None:
    """The same where norms alone are rebuilt. A function of its own, so that a pickled model names it."""
    _enter(model, inputs, norms_only=True)


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
    for hooks, ours in ((module._forward_pre_hooks, (_enter, _enter_for_norms)), (module._forward_hooks, (_leave,))):
        for key in [key for key, each in hooks.items() if each in ours]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


@dataclass(frozen=True)
class _Hooks:
    """A model's forward as a region in which cheap activations are not kept."""

    module: nn.Module = field(repr=False)
    enter: Callable[[nn.Module, Any], None] = _enter
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
        return any(hook is self.enter for hook in self.module._forward_pre_hooks.values())

    def apply(self) -> None:
        self.module.register_forward_pre_hook(self.enter)
        self.module.register_forward_hook(_leave, always_call=True)

    def revert(self) -> None:
        remove(self.module)


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """The model itself, where ``recompute`` is asked for; see :class:`.recogniser.Recogniser`."""
    if options.recompute == "norms":
        yield _Hooks(model, _enter_for_norms, kernel="norms rebuilt")
    elif options.recompute == "cheap":
        yield _Hooks(model)
