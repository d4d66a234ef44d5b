"""Logits that are not there yet: what a patched LM head returns inside a forward that was given labels.

:class:`DeferredLogits` holds the head's input and weight and records what the model does to its logits on the way to
the loss: casts, scaling, a soft-cap, slices, reshapes. When it meets :func:`torch.nn.functional.cross_entropy`, or a
log-softmax of which one class a row is gathered, the fused op runs and no logits are made. Any other use materialises
them and goes on with an ordinary tensor, so code that this file has never heard of stays correct. :mod:`.lazy_logits`
is the form in which an evaluation hands them out.

It is a ``NamedTuple`` that speaks ``__torch_function__``, and not a tensor subclass, since Dynamo refuses a wrapper
subclass made inside a graph, and since a ``NamedTuple`` is the one container that DDP, both FSDPs and DeepSpeed
traverse and rebuild with its type.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cross_entropy, linear_cross_entropy
from ..kernels._dtypes import gradient_dtype
from ..kernels._vocabulary import VocabularyShard, local_head, replicated
from . import sharding
from .class_changes import ClassChange, Filled, Scaled, Shifted, chosen_classes, one_a_class
from .counted_labels import CountedLabels
from .deferred_log_probs import DeferredLogProbs, likeliest_classes
from .sharding import HeadWeight

__all__ = ["DeferredLogits", "Head", "defer", "label_smoothing"]


class _Tie(torch.autograd.Function):
    """Hands on hidden states, weight and bias through one node.

    Their gradients come back together, so that a sharding framework's pre-backward hook on the hidden states has run
    before the weight's gradient is accumulated. They are no views, which FSDP2 warns about.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, copy: bool) -> Any:
        ctx.set_materialize_grads(False)
        keep = _copied if copy else Tensor.detach
        kept = keep(weight), None if bias is None else keep(bias)
        frozen = [each for i, each in enumerate(kept) if each is not None and not ctx.needs_input_grad[1 + i]]
        ctx.mark_non_differentiable(*frozen)
        return hidden.detach(), *kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients, None


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


class Head:
    """The LM head as one forward met it. Opaque to frameworks that look for tensors in a module's outputs.

    Its tensors are let go after the loss, so that ``outputs.logits`` pins no weight; later uses take the module's.
    Where the module has its weight for the time of the forward only, they stay as long as the logits. Of a
    tensor-parallel head they are this rank's rows, and ``shard`` says which. ``low_rank_weight``, (V, r) of an
    adapter, is small, and stays.
    """

    __slots__ = (
        "bias",
        "compute_dtype",
        "lent",
        "low_rank_weight",
        "module",
        "n_classes",
        "shard",
        "tile_bytes",
        "weight",
    )

    def __init__(self, module: nn.Linear, compute_dtype: torch.dtype, tile_bytes: int | None) -> None:
        self.module: weakref.ref[nn.Linear] = weakref.ref(module)
        self.compute_dtype = compute_dtype
        self.tile_bytes = tile_bytes
        self.n_classes = module.weight.shape[0]
        self.lent = not torch.compiler.is_compiling() and sharding.is_lent(module.weight)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.low_rank_weight: Tensor | None = None
        self.shard: VocabularyShard | None = None

    def tensors(self, n_classes: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight (V, H) and bias (V,), or the first ``n_classes`` rows of both.

        Raises:
            RuntimeError: after the loss, when the head's module is gone or no longer holds its whole weight.
        """
        weight, bias = self._whole()
        if n_classes is None or n_classes == self.n_classes:
            return weight, bias
        if self.shard is not None:
            n_classes = max(0, n_classes - self.shard.first_class)
        return weight[:n_classes], None if bias is None else bias[:n_classes]

    def shard_of(self, n_classes: int) -> VocabularyShard | None:
        """What the rows that :meth:`tensors` gives are of a head of so many classes, where ranks hold it together."""
        return None if self.shard is None else self.shard.first(n_classes)

    def _whole(self) -> tuple[Tensor, Tensor | None]:
        compiling = torch.compiler.is_compiling()
        if self.weight is not None and (compiling or not sharding.is_freed(self.weight)):
            return self.weight, self.bias
        module = self.module()
        if module is not None and self.shard is not None:
            return local_head(module.weight, module.bias)[:2]
        weight: Any = None if module is None else sharding.gathered(module.weight)
        whole = weight is not None and weight.dim() == 2 and weight.shape[0] == self.n_classes
        if module is None or not whole or (not compiling and sharding.is_freed(weight)):
            raise RuntimeError(
                "outputs.logits were not built, since the fused loss did not need them, and the LM head's weight is no "
                "longer whole. Read the logits before the next forward or backward, or from a forward without labels, "
                "or patch with fused_linear_cross_entropy=False."
            )
        return weight, None if module.bias is None else sharding.gathered(module.bias)

    def whole_logits(self, hidden: Tensor) -> Tensor:
        """Logits of all ranks' classes, gathered, where ranks hold the head together."""
        module = self.module()
        assert module is not None
        return tensor_parallel_logits(module, hidden, self.compute_dtype).full_tensor()

    def release(self) -> None:
        if not self.lent:
            self.weight = self.bias = None


@dataclass(frozen=True)
class _Transform:
    """What happened to the logits: ``inner * l``, or ``outer * tanh(inner * l)`` once capped; then a cast.

    ``n_classes`` counts the columns left of the head's. No field is called ``dtype``: accelerate takes what has
    one for a tensor.
    """

    cast_to: torch.dtype
    n_classes: int
    inner: float = 1.0
    outer: float = 1.0
    capped: bool = False
    gathered: bool = False  # asked for as a whole by the hook of a tensor-parallel head

    def times(self, factor: float) -> _Transform:
        if self.capped:
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits[..., : self.n_classes].to(self.cast_to)
        if self.inner != 1:
            logits = logits * self.inner
        if self.capped:
            logits = torch.tanh(logits) * self.outer
        return logits

    def loss_options(self) -> dict[str, Any]:
        if self.capped:
            return {"softcap": self.outer, "logit_scale": self.inner * self.outer}
        return {"logit_scale": self.inner}


class _Cell:
    """What an in-place change of the logits changes: their classes' changes, and the logits once they were built."""

    __slots__ = ("changes", "value")

    def __init__(self, changes: tuple[ClassChange, ...] = ()) -> None:
        self.changes = changes
        self.value: Tensor | None = None


class _Fields(NamedTuple):
    hidden: Tensor  # (*, H); the logits (*, V) themselves where head is None
    head: Head | None
    transform: _Transform
    cell: _Cell
    low_rank: Tensor | None = None  # (*, r) hidden states of the head's low-rank term


_SMOOTHING: list[_Smoothing] = []


@dataclass
class _Smoothing:
    value: float
    applied: bool = False


@contextmanager
def label_smoothing(value: float) -> Iterator[_Smoothing]:
    """Smooth the labels of every deferred cross entropy inside by ``value``, in [0, 1).

    Yields:
        An object whose ``applied`` becomes True when a cross entropy took it over.
    """
    smoothing = _Smoothing(value)
    _SMOOTHING.append(smoothing)
    try:
        yield smoothing
    finally:
        _SMOOTHING.pop()


class DeferredLogits(_Fields):
    """Logits of shape (\\*, V) that a fused loss can do without; see the module's docstring."""

    __slots__ = ()

    # -- what a tensor says of itself ------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.transform.n_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.transform.cast_to

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or (self.low_rank is not None and self.low_rank.requires_grad)

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return prod(self.shape)

    # -- what is recorded ------------------------------------------------------------------------------------------

    def _with(
        self, hidden: Tensor | None = None, transform: _Transform | None = None, low_rank: Tensor | None = None
    ) -> DeferredLogits:
        return DeferredLogits(
            self.hidden if hidden is None else hidden,
            self.head,
            self.transform if transform is None else transform,
            _Cell(self.cell.changes),
            self.low_rank if low_rank is None else low_rank,
        )

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """Other rows, as ``change`` makes them of tensors (\\*, columns)."""
        return self._with(change(self.hidden), low_rank=None if self.low_rank is None else change(self.low_rank))

    def with_low_rank(self, hidden: Tensor, weight: Tensor) -> DeferredLogits:
        """These logits plus ``hidden @ weight.T``, of (\\*, r) and (V, r): an adapter's.

        Only of logits as :func:`defer` made them, of a head that is not divided over ranks.
        """
        assert self.head is not None and self.head.shard is None
        # A framework that shards it takes its memory back before all logits are read, and it is small.
        copy = torch.distributed.is_available() and torch.distributed.is_initialized()
        # As the head's own: one node for both, where the weight's gradient has the weight's dtype.
        if torch.is_grad_enabled() and hidden.requires_grad and gradient_dtype(weight) == weight.dtype:
            hidden, weight, _ = _Tie.apply(hidden, weight, None, copy)
        elif copy:
            weight = weight.clone()
        self.head.low_rank_weight = weight
        return self._with(low_rank=hidden)

    def low_rank_term(self) -> tuple[Tensor, Tensor] | None:
        """The low-rank term of these logits as the kernels take it: (\\*, r) and (V, r); None without one."""
        if self.low_rank is None or self.head is None or self.head.low_rank_weight is None:
            return None
        return self.low_rank, self.head.low_rank_weight[: self.transform.n_classes]

    def _of_classes(self) -> bool:
        """Whether a change of single classes' logits can be recorded: they are the head's, cast at the most."""
        linear = self.transform.inner == 1 and not self.transform.capped
        return self.head is not None and self.low_rank is None and self.cell.value is None and linear

    def _is_for_classes(self, numbers: Any) -> bool:
        fits = one_a_class(numbers, self.dim(), self.shape[-1]) and self._of_classes()
        return fits and numbers.is_floating_point()

    def _changed(self, change: type[Scaled | Shifted], numbers: Tensor) -> DeferredLogits:
        # A copy, since sharding frameworks free parameters, and buffers change.
        dtype = torch.promote_types(self.dtype, numbers.dtype)
        changed = self._with(transform=replace(self.transform, cast_to=dtype))
        changed.cell.changes += (change(numbers.reshape(-1).to(dtype, copy=True), dtype),)
        return changed

    def _fill(self, chosen: Tensor | None, value: Any) -> bool:
        """Record a constant in place of the chosen classes' logits, in place; False where it can't be."""
        if chosen is None or not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        self.cell.changes += (Filled(chosen, float(value)),)
        return True

    def _cast(self, dtype: torch.dtype) -> Any:
        # A cast to a narrower type rounds, which the fused op would not.
        if self.cell.value is not None or dtype.itemsize < self.dtype.itemsize or not dtype.is_floating_point:
            return self.materialize().to(dtype)
        return self if dtype == self.dtype else self._with(transform=replace(self.transform, cast_to=dtype))

    def float(self) -> Any:
        return self._cast(torch.float32)

    def double(self) -> Any:
        return self._cast(torch.float64)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1:
            if isinstance(args[0], torch.dtype):
                return self._cast(args[0])
            if isinstance(args[0], (torch.device, str)) and torch.device(args[0]) == self.device:
                return self
        return self.materialize().to(*args, **kwargs)

    def contiguous(self) -> Any:
        return self

    def is_contiguous(self) -> bool:
        return self.cell.value is None or self.cell.value.is_contiguous()

    def transpose(self, dim0: int, dim1: int) -> Any:
        moved = [dim % self.dim() if -self.dim() <= dim < self.dim() else None for dim in (dim0, dim1)]
        if self.cell.value is not None or None in moved or self.dim() - 1 in moved:
            return self.materialize().transpose(dim0, dim1)
        return self._of_rows(lambda x: x.transpose(dim0, dim1))

    def _reshaped(self, name: str, shape: tuple[Any, ...]) -> Any:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
            shape = tuple(shape[0])
        if self.cell.value is None and shape and all(isinstance(n, (int, torch.SymInt)) for n in shape):
            leading, last = shape[:-1], shape[-1]
            if last == -1 and -1 not in leading:
                last = self.numel() // max(prod(leading), 1)
            if last == self.shape[-1] and leading:
                # view and reshape alike: the hidden states may be copied where the logits would not have been.
                return self._of_rows(lambda x: x.reshape(*leading, x.shape[-1]))
        return getattr(self.materialize(), name)(*shape)

    def view(self, *shape: Any) -> Any:
        return self._reshaped("view", shape)

    def reshape(self, *shape: Any) -> Any:
        return self._reshaped("reshape", shape)

    def __getitem__(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        if self.cell.value is None:
            rows, columns = _split_index(items, self.dim())
            if rows is not None:
                kept = self._of_rows(lambda x: x[rows])
                if columns is None:
                    return kept
                width = len(range(*columns.indices(self.shape[-1])))
                return kept._with(transform=replace(kept.transform, n_classes=width))
        return self.materialize()[index]

    def _times(self, factor: Any, invert: bool = False) -> Any:
        if not invert and self._is_for_classes(factor):
            return self._changed(Scaled, factor)
        if self.cell.value is None and isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor:
            return self._with(transform=self.transform.times(1 / factor if invert else factor))
        return self.materialize() / factor if invert else self.materialize() * factor

    def __mul__(self, factor: Any) -> Any:
        return self._times(factor)

    __rmul__ = mul = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return self._times(factor, invert=True)

    div = __truediv__

    def __add__(self, numbers: Any) -> Any:
        if self._is_for_classes(numbers):
            return self._changed(Shifted, numbers)
        _announce(self, "add")
        return self.materialize() + _materialized(numbers)

    __radd__ = __add__

    def add(self, numbers: Any, **options: Any) -> Any:
        return self.materialize().add(_materialized(numbers), **options) if options else self + numbers

    def masked_fill(self, mask: Tensor, value: Any) -> Any:
        if self._of_classes() and one_a_class(mask, self.dim(), self.shape[-1]):
            filled = self._with()
            if filled._fill(mask.reshape(-1).clone(), value):
                return filled
        _announce(self, "masked_fill")
        return self.materialize().masked_fill(mask, value)

    def tanh(self) -> Any:
        if self.cell.value is None and not self.transform.capped:
            return self._with(transform=replace(self.transform, capped=True))
        return self.materialize().tanh()

    # -- what the hook of a tensor-parallel head asks of its output --------------------------------------------------

    @property
    def placements(self) -> Any:
        if self.head is None or self.head.shard is None:
            raise AttributeError("only logits of a tensor-parallel head have placements")
        from torch.distributed.tensor import Shard

        return (Shard(-1),)

    def redistribute(self, *, placements: Any, **options: Any) -> DeferredLogits:
        """Logits that are not there are everywhere: gathered, they stay what they are."""
        return self._with(transform=replace(self.transform, gathered=all(each.is_replicate() for each in placements)))

    def to_local(self) -> Any:
        if self.transform.gathered or self.head is None:
            return self
        module = self.head.module()
        assert module is not None
        return tensor_parallel_logits(module, self.hidden, self.head.compute_dtype).to_local()

    def log_softmax(self, dim: int, dtype: torch.dtype | None = None) -> Any:
        if dim not in (-1, self.dim() - 1) or self.cell.value is not None or torch.compiler.is_compiling():
            return torch.log_softmax(self.materialize(), dim, dtype=dtype)
        if dtype is None:
            lifted = torch.is_autocast_enabled(self.device.type) and self.dtype.itemsize < 4
            dtype = torch.float32 if lifted else self.dtype
        return DeferredLogProbs(self, dtype)

    def unsmoothed_cross_entropy(self, target: Tensor, *args: Any, **options: Any) -> Tensor:
        """Their cross entropy, whatever :func:`label_smoothing` says: that of a model which smooths by itself."""
        with label_smoothing(0.0):
            return F.cross_entropy(self, target, *args, **options)  # type: ignore[arg-type]

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        last = dim in (-1, self.dim() - 1) and not keepdim
        classes = likeliest_classes(self) if last else None
        return self.materialize().argmax(dim, keepdim) if classes is None else classes

    # -- where logits are needed after all -------------------------------------------------------------------------

    def materialize(self) -> Tensor:
        """Build the logits, differentiably.

        Raises:
            RuntimeError: after the loss, when the head's weight is no longer whole (see :meth:`Head.tensors`).
        """
        if self.cell.value is None:
            logits = self.hidden
            if self.head is not None and self.head.shard is not None:
                logits = self.head.whole_logits(logits)
            elif self.head is not None:
                weight, bias = self.head.tensors()
                dtype = self.head.compute_dtype
                # Inside autocast this is what autocast does; outside it the dtypes would not meet by themselves.
                with torch.autocast(logits.device.type, enabled=False):
                    logits = F.linear(logits.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
                    if self.low_rank is not None and self.head.low_rank_weight is not None:
                        logits = logits + F.linear(self.low_rank.to(dtype), self.head.low_rank_weight.to(dtype))
            for change in self.cell.changes:
                logits = change.of_logits(logits[..., : change.n_classes])
            self.cell.value = self.transform.apply(logits)
        return self.cell.value

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) of the head that gives these logits but for their transform.

        Raises:
            RuntimeError: see :meth:`Head.tensors`.
        """
        assert self.head is not None
        n_classes = self.transform.n_classes
        if not self.cell.changes:
            return self.head.tensors(n_classes)
        weight, bias = self.head.tensors()
        first = 0 if self.head.shard is None else self.head.shard.first_class
        for change in self.cell.changes:
            n_own = max(0, min(change.n_classes - first, len(weight)))
            bias = None if bias is None else bias[:n_own]
            weight, bias = change.of_rows(weight[:n_own], bias, slice(first, first + n_own), self.head.compute_dtype)
        n_own = max(0, n_classes - first)
        return weight[:n_own], None if bias is None else bias[:n_own]

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._of_classes():
            chosen = chosen_classes(index, self.dim(), self.shape[-1], self.device)
            if self._fill(chosen, value):
                return
        _announce(self, "an assignment to some of them")
        self.materialize()[index] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        _announce(self, name)
        return getattr(self.materialize(), name)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = _RECORDED.get(func)
        if recorder is not None and args and isinstance(args[0], DeferredLogits):
            result = recorder(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for each in (*args, *kwargs.values()):
            if isinstance(each, DeferredLogits):
                _announce(each, getattr(func, "__name__", repr(func)))
        return func(*_materialized(args), **_materialized(kwargs))


_ANNOUNCED: set[str] = set()


def _announce(logits: DeferredLogits, operation: str) -> None:
    """Warn, once an operation, that a model uses its logits in a way that needs their values before the loss."""
    pending = logits.cell.value is None and logits.head is not None and logits.head.weight is not None
    if pending and not torch.compiler.is_compiling() and operation not in _ANNOUNCED:
        _ANNOUNCED.add(operation)
        warnings.warn(
            f"the logits are built, as without liger_trainer: the fused loss knows no {operation} of logits",
            stacklevel=4,
        )


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def materialize_and_apply(self: DeferredLogits, *others: Any) -> Any:
        _announce(self, function.__name__)
        return function(self.materialize(), *_materialized(others))

    return materialize_and_apply


# tuple has its own meaning for some of these; a caller who writes them means the tensor's.
for _name in ("sub", "neg", "eq", "ne", "lt", "le", "gt", "ge", "matmul", "pow", "floordiv", "mod", "abs"):
    setattr(DeferredLogits, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))
DeferredLogits.__rsub__ = _operator(lambda logits, other: other - logits)  # type: ignore[attr-defined]
DeferredLogits.__rtruediv__ = _operator(lambda logits, other: other / logits)  # type: ignore[attr-defined]


def _materialized(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.materialize()
    if type(value) in (tuple, list):
        return type(value)(_materialized(each) for each in value)
    if type(value) is dict:
        return {key: _materialized(each) for key, each in value.items()}
    return value


def _split_index(items: tuple[Any, ...], n_dims: int) -> tuple[tuple[Any, ...] | None, slice | None]:
    """The part of an index that selects rows, and the slice of leading columns; (None, None) for any other index."""
    ellipses = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1 or any(item is None or isinstance(item, bool) for item in items):
        return None, None
    spans = [item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in items]
    missing = n_dims - (sum(spans) - len(ellipses))
    if missing < 0:
        return None, None
    at = ellipses[0] if ellipses else len(items)
    rows = [*items[:at], *[slice(None)] * missing, *items[at + 1 :]]
    last = rows.pop()
    if not isinstance(last, slice) or last.step not in (None, 1) or last.start not in (None, 0):
        return None, None
    return tuple(rows), None if last.stop is None else last


def _fused_cross_entropy(
    logits: DeferredLogits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    fits = (
        logits.cell.value is None
        and isinstance(target, Tensor)
        and not target.is_floating_point()
        and logits.dim() == target.dim() + 1 == 2
        and size_average is None
        and reduce is None
        and (not logits.transform.capped or logits.transform.outer > 0)
    )
    if not fits:
        return NotImplemented
    smoothing = label_smoothing
    if _SMOOTHING and not label_smoothing:
        smoothing = _SMOOTHING[-1].value
        _SMOOTHING[-1].applied = True
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": smoothing,
        **logits.transform.loss_options(),
    }
    n_classes = logits.transform.n_classes
    max_valid = target.upper_bound(ignore_index) if isinstance(target, CountedLabels) else None
    if isinstance(target, CountedLabels):
        target = target.plain()
    loss: Any
    if logits.head is None:
        loss = cross_entropy(logits.hidden[..., :n_classes], target, weight=weight, **options)
    else:
        head_weight, bias = logits.rows()
        loss = linear_cross_entropy(
            logits.hidden,
            head_weight,
            target,
            bias=bias,
            low_rank=logits.low_rank_term(),
            class_weights=weight,
            tile_bytes=logits.head.tile_bytes,
            max_valid=max_valid,
            compute_dtype=logits.head.compute_dtype,
            vocab_shard=logits.head.shard_of(n_classes),
            **options,
        )
        logits.head.release()
    # PyTorch's loss has the logits' dtype, except where autocast lifts it to fp32.
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


_RECORDED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: _fused_cross_entropy,
    F.log_softmax: lambda logits, dim=None, _stacklevel=3, dtype=None: (
        NotImplemented if dim is None else logits.log_softmax(dim, dtype)
    ),
    torch.log_softmax: lambda logits, dim, dtype=None: logits.log_softmax(dim, dtype),
    torch.argmax: DeferredLogits.argmax,
    torch.transpose: DeferredLogits.transpose,
    torch.tanh: DeferredLogits.tanh,
    torch.mul: DeferredLogits.__mul__,
    torch.add: DeferredLogits.add,
    torch.masked_fill: DeferredLogits.masked_fill,
    torch.div: lambda logits, factor, **rounding: NotImplemented if rounding else logits / factor,
}


def tensor_parallel_logits(module: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> Any:
    """The logits (\\*, V) of a head that ranks hold together, as a DTensor that is divided by classes."""
    from torch.distributed.tensor import DTensor, Replicate

    weight: Any = module.weight
    inputs = DTensor.from_local(hidden.to(dtype), weight.device_mesh, [Replicate()], run_check=False)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(inputs, weight.to(dtype), None if module.bias is None else module.bias.to(dtype))


def defer(
    module: nn.Linear,
    hidden: Tensor,  # (*, H)
    *,
    logits: Tensor | None,  # (*, V)
    tile_bytes: int | None,
    weight_as: HeadWeight = HeadWeight.ALIAS,
) -> DeferredLogits:
    """What the head ``module`` returns for ``hidden`` in place of logits; with ``logits`` they exist already."""
    if logits is not None:
        return DeferredLogits(logits, None, _Transform(logits.dtype, logits.shape[-1]), _Cell())
    weight, bias, shard = local_head(module.weight, module.bias)
    if shard is not None:
        hidden = replicated(hidden)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    head = Head(module, torch.get_autocast_dtype(device_type) if autocast else hidden.dtype, tile_bytes)
    copy, own_unit = weight_as is HeadWeight.COPY, weight_as is not HeadWeight.ALIAS
    # A tensor's gradient has the tensor's dtype: a weight that wants another is passed on itself.
    tied = hidden.requires_grad and (torch.compiler.is_dynamo_compiling() or gradient_dtype(weight) == weight.dtype)
    # A unit of its own waits for the gradient of the head's output, even where the head's input has none.
    held = (own_unit or head.lent) and (hidden.requires_grad or weight.requires_grad)
    if torch.is_grad_enabled() and (tied or held):
        hidden, weight, bias = _Tie.apply(hidden, weight, bias, copy)
    elif copy:
        weight, bias = _copied(weight), None if bias is None else _copied(bias)
    elif head.lent:  # ZeRO-3 takes the memory out of the parameter, not out of what shares it
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    head.weight, head.bias, head.shard = weight, bias, shard
    return DeferredLogits(hidden, head, _Transform(head.compute_dtype, head.n_classes), _Cell())
