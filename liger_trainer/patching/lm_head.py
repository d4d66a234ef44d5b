"""The LM head and the loss behind it: recognised, joined by deferred logits.

Two classes are swapped. The head's forward returns :class:`~.deferred_logits.DeferredLogits` while its model's forward
works on labels, and logits at any other time; the model's forward, which is not copied but called, sets that span.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._tiles import _TILE_BYTES
from ..kernels._vocabulary import is_divided_by_rows, is_dtensor
from . import class_swap
from .adapters import adapted_layer, difference_of_adapters, is_plain, linear_of, low_rank_term, reason_against_adapters
from .counted_labels import count_labels
from .deferred_logits import DeferredLogits, defer
from .lazy_logits import settle
from .memory import Trial
from .options import Options
from .own_head import forward_with_product, has_own_forward, reason_against_trial, with_few_classes
from .probe import Noise, quiet
from .recogniser import ClassSwap, Finding, Skip, apply_all
from .sharding import HeadWeight, keep_whole, whole_shape

__all__ = ["recognise"]

_LABEL_ARGUMENTS = ("labels", "shift_labels")


def _can_defer(head: nn.Linear) -> bool:
    """Whether the loss can do with the weight as it is: whole, or a tensor-parallel one's rows outside of Dynamo."""
    return not is_dtensor(head.weight) or (is_divided_by_rows(head.weight) and not torch.compiler.is_compiling())


def _deferred(head: nn.Linear, fused: bool, tile_bytes: int | None, input: Tensor) -> DeferredLogits:
    logits = None if fused else F.linear(input, head.weight, head.bias)
    weight_as: Any = getattr(head, "_liger_deferring", None) or HeadWeight.ALIAS
    return defer(head, input, logits=logits, tile_bytes=tile_bytes, weight_as=weight_as)


@functools.cache
def _head_members(original: Callable[..., Any], fused: bool, tile_bytes: int | None) -> dict[str, Any]:
    def forward(self: nn.Linear, input: Tensor) -> Any:
        if self._liger_deferring is None or not _can_defer(self):
            return F.linear(input, self.weight, self.bias)
        return _deferred(self, fused, tile_bytes, input)

    def own_forward(self: nn.Linear, input: Tensor) -> Any:
        if self._liger_deferring is None or is_dtensor(self.weight):
            return original(self, input)
        return forward_with_product(original, self, functools.partial(_deferred, self, fused, tile_bytes), input)

    chosen = forward if original is nn.Linear.forward else own_forward
    return {"forward": functools.wraps(original)(chosen), "_liger_deferring": None}


@functools.cache
def _model_members(original: Callable[..., Any]) -> dict[str, Any]:
    # Bound once: inspecting a signature in every forward costs more than the forward's own Python.
    positions = {name: i for i, name in enumerate(inspect.signature(original).parameters) if name in _LABEL_ARGUMENTS}

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_is_replica", False):  # of nn.DataParallel, which gathers outputs that are tensors only
            return original(self, *args, **kwargs)
        outer = _head_of(self)
        head: Any = None if outer is None else linear_of(outer)
        deferring = False
        for name in _LABEL_ARGUMENTS:
            if kwargs.get(name) is not None:
                kwargs[name] = count_labels(kwargs[name])
                deferring = True
            elif name in positions and len(args) > positions[name] - 1 and args[positions[name] - 1] is not None:
                deferring = True
        if not deferring or outer is None or not hasattr(type(head), "_liger_deferring"):
            return original(self, *args, **kwargs)
        # Of two forwards on one head, one inside the other, the outer one says what leaves the model. (Dynamo would
        # guard on the attribute, which it leaves behind.)
        if not torch.compiler.is_compiling() and head._liger_deferring is not None:
            return original(self, *args, **kwargs)
        adapted = adapted_layer(outer)
        if adapted is not None and _reason_against_adapted(adapted, head) is not None:
            return original(self, *args, **kwargs)
        head._liger_deferring = keep_whole(outer)
        # transformers' tensor parallelism would look for a tensor in what the head returns.
        hooked = not torch.compiler.is_compiling() and _is_tensor_parallel(head)
        around = vars(head).pop("forward") if hooked else None
        if adapted is not None:
            adapted.forward = functools.partial(_adapted_forward, adapted, head)
        try:
            outputs = original(self, *args, **kwargs)
        finally:
            if around is not None:
                head.forward = around
            if adapted is not None:
                del adapted.forward
            if torch.compiler.is_compiling():
                head._liger_deferring = None  # Dynamo can't replay a deletion
            else:
                del head._liger_deferring
        return settle(outputs)

    return {"forward": forward}


def _adapted_forward(adapted: Any, linear: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a peft layer with LoRA adapters, ``linear`` being its base that defers its logits."""
    # Which adapter a row has is no business of the losses, and the weight is merged no more once adapters are off.
    logits = None
    if not args and not kwargs and not (adapted.disable_adapters and adapted.merged):
        logits = adapted.base_layer(hidden)
    if logits is None or (isinstance(logits, DeferredLogits) and logits.head is not None and logits.head.shard):
        deferring, linear._liger_deferring = linear._liger_deferring, None
        try:
            return type(adapted).forward(adapted, hidden, *args, **kwargs)
        finally:
            linear._liger_deferring = deferring
    term = low_rank_term(adapted, hidden)
    if term is None:
        return logits
    if isinstance(logits, DeferredLogits) and logits.head is not None:
        return logits.with_low_rank(*term)
    logits = logits.materialize() if isinstance(logits, DeferredLogits) else logits
    return logits + F.linear(*term).to(logits.dtype)


def _reason_against_adapted(adapted: Any, linear: nn.Module) -> str | None:
    """Why the logits of a peft layer with LoRA adapters can't be deferred, or None."""
    if "forward" in vars(adapted):
        return "the forward of its adapters' layer was replaced on the instance"
    if not is_plain(linear):  # what its forward makes of the product, the adapters' is added to
        return f"under its adapters it is a {class_swap.stock_class(linear).__name__}, not a plain torch.nn.Linear"
    if torch.compiler.is_compiling() or _is_tensor_parallel(linear):
        return "it has adapters, and is compiled or tensor-parallel"
    reason = reason_against_adapters(adapted, served=(None,))
    return None if reason is None else f"its {reason}"


def _is_tensor_parallel(head: nn.Module) -> bool:
    """Whether transformers has divided the head over ranks, by classes, and put its forward into one that gathers."""
    forward = vars(head).get("forward")
    made_by = getattr(forward, "__module__", None) or ""
    return made_by.startswith("transformers.") and "tensor_parallel" in made_by and is_divided_by_rows(head.weight)


def _small_head(head: nn.Module, noise: Noise) -> nn.Linear:
    """A head for 37 classes with random numbers of the dtype of ``head``, and with its forward."""
    if has_own_forward(head):
        return with_few_classes(head, 37, noise)
    assert isinstance(head.weight, Tensor)
    small = nn.Linear(24, 37, bias=False, device="meta")
    small.weight = nn.Parameter(noise.normal(37, 24, dtype=head.weight.dtype))
    return small


def _check(head: nn.Module, fused: bool) -> str | None:
    """Compare loss and gradients on small random tensors of the head's dtype and device with PyTorch's own."""
    assert isinstance(head.weight, Tensor)
    device = head.weight.device if head.weight.device.type != "meta" else torch.device("cpu")
    noise, dtype = Noise(device), head.weight.dtype
    labels = torch.tensor([5, 0, -100, 36, 11, 5, 20], device=device)
    with quiet(device):
        reason = reason_against_trial(head) if has_own_forward(head) else None
        if reason is not None:
            return reason
        small = _small_head(head, noise)
        width = small.weight.shape[1]
        hidden = noise.normal(7, width, dtype=dtype, scale=(24 / width) ** 0.5)
        results: list[tuple[Tensor, ...]] = []
        for deferred in (True, False):
            # Both start from the same rounded numbers. (FSDP2 forbids copies of what refers to one of its modules.)
            module = small if deferred else _small_head(head, Noise(device)).double()
            leaf = hidden.to(module.weight.dtype, copy=True).requires_grad_()
            try:
                product = functools.partial(_deferred, module, fused, 3 * 37 * dtype.itemsize)
                if not deferred:
                    logits = module(leaf)
                elif has_own_forward(head):
                    logits = forward_with_product(nn.Module.__call__, module, product, leaf)
                else:
                    logits = product(leaf)
                if deferred and not (isinstance(logits, DeferredLogits) and logits.cell.value is None):
                    return f"the forward of its {type(head).__name__} needs the logits' values"
                loss = F.cross_entropy(logits.float() if deferred else logits.double(), labels)
                leaves = (leaf, *(p for p in module.parameters() if p.requires_grad))
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            except Exception as error:
                return f"its forward raises {type(error).__name__}: {' '.join(str(error).split())[:200]}, on a probe"
            results.append((loss.detach(), *gradients))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 3e-2
    trained = [name for name, parameter in small.named_parameters() if parameter.requires_grad]
    names = ("loss", *(f"{name}'s gradient" for name in ("hidden", *trained)))
    for name, ours, reference in zip(names, *results, strict=True):
        gap, size = (float(each.norm()) for each in (ours.double() - reference.double(), reference.double()))
        if not gap <= tolerance * size:
            return f"the fused loss differs from PyTorch's here: {name} by {gap / size:.1e}, more than {tolerance:.0e}"
    return None


def _head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes model's logits: what it names, or else the one that a model inside it names."""
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            head = module.get_output_embeddings()  # type: ignore[operator]
            if isinstance(head, nn.Module):
                return head
    return None


def _models_with_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module that takes labels and names its head, with that head; (path, module, head's path, head)."""
    paths = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        if not callable(getattr(type(module), "get_output_embeddings", None)):
            continue
        if "labels" not in inspect.signature(type(module).forward).parameters:
            continue
        outer = _head_of(module)
        head = None if outer is None else linear_of(outer)
        if head is not None and id(head) in paths:
            yield path, module, paths[id(head)], head


def _reason_against(model: nn.Module, head: nn.Module, fused: bool) -> str | None:
    if "forward" in vars(model):
        return f"the forward of its {type(model).__name__} was replaced on the instance"
    stock = class_swap.stock_class(head)
    if isinstance(head, nn.ModuleList):
        return f"it is a list of {len(head)} heads whose logits are stacked, which take little where classes are codes"
    served = stock.forward is nn.Linear.forward or (fused and has_own_forward(head))
    if not served or not isinstance(getattr(head, "weight", None), Tensor):
        return f"it is a {stock.__module__}.{stock.__name__}, not a plain torch.nn.Linear"
    if "forward" in vars(head) and not _is_tensor_parallel(head):
        return "its forward was replaced on the instance"
    if getattr(head, "_is_hooked", False) and not is_dtensor(head.weight):
        return "its weight is this rank's part of a tensor-parallel one, and no DTensor that would say which"
    if not head.weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is {head.weight.dtype}, not floating point"
    return None


@dataclass(frozen=True)
class _HeadWithModels:
    """The head's class and those of the models that compute their loss behind it, swapped together."""

    head: ClassSwap
    models: tuple[ClassSwap, ...]

    @property
    def kind(self) -> str:
        return self.head.kind

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def class_name(self) -> str:
        return self.head.class_name

    @property
    def kernel(self) -> str:
        return self.head.kernel

    @property
    def checked(self) -> tuple[torch.dtype, ...]:
        return self.head.checked

    @property
    def trial(self) -> Callable[[int, int], Trial | int] | None:
        return self.head.trial

    @property
    def verify(self) -> Callable[[], str | None] | None:
        return self.head.verify

    @property
    def in_force(self) -> bool:
        return all(swap.in_force for swap in (self.head, *self.models))

    def apply(self) -> None:
        apply_all((self.head, *self.models))

    def revert(self) -> None:
        for swap in (*self.models, self.head):
            swap.revert()


def _logits_bytes(head: nn.Module, fused: bool, tile_bytes: int | None, batch: int, length: int) -> int:
    """The bytes of logits that are not made: in the head's dtype, in fp32, and their log-softmax, less one tile."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    n_classes = whole_shape(weight)[0]
    logits = batch * length * n_classes
    if not fused:
        return 8 * logits
    return max(logits * (weight.dtype.itemsize + 8) - (tile_bytes or _TILE_BYTES), 0)


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find heads whose logits go to a loss inside their model's forward."""
    if not (options.fused_linear_cross_entropy or options.cross_entropy):
        return
    fused = options.fused_linear_cross_entropy
    kind = "fused_linear_cross_entropy" if fused else "cross_entropy"
    kernel = "linear_cross_entropy" if fused else "cross_entropy"
    found: dict[str, tuple[ClassSwap, list[ClassSwap]]] = {}
    for path, module, head_path, head in _models_with_heads(model):
        adapted = adapted_layer(_head_of(module))
        reason = _reason_against(module, head, fused)
        if reason is None and adapted is not None:
            reason = _reason_against_adapted(adapted, head)
        if reason is None and (options.check or has_own_forward(head)):
            reason = _check(head, fused) or (None if adapted is None else difference_of_adapters(adapted))
        if reason is not None:
            yield Skip(kind, head_path, type(head).__name__, reason)
            continue
        if head_path not in found:
            forward = class_swap.stock_class(head).forward
            members = functools.partial(_head_members, forward, fused, options.tile_bytes)
            checked = (cast(Tensor, head.weight).dtype,) if options.check else ()
            trial = functools.partial(_logits_bytes, head, fused, options.tile_bytes)
            verify = functools.partial(_check, head, fused)
            found[head_path] = ClassSwap(kind, head_path, kernel, head, members, checked, trial, verify), []
        original = class_swap.stock_class(module).forward
        members = functools.partial(_model_members, original)
        found[head_path][1].append(ClassSwap(kind, path, kernel, module, members))
    for head_swap, models in found.values():
        yield _HeadWithModels(head_swap, tuple(models))
