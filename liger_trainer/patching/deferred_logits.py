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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cross_entropy, linear_cross_entropy
from .class_changes import ClassChange, Filled, Scaled, Shifted, chosen_classes, one_a_class
from .counted_labels import CountedLabels
from .deferred_log_probs import DeferredLogProbs, likeliest_classes
from .head_tensors import Head, kept_pair, met, tensor_parallel_logits
from .logit_transform import Transform, split_index
from .sharding import HeadWeight

__all__ = ["DeferredLogits", "defer", "label_smoothing"]


class _Cell:
    """What an in-place change of the logits changes: their classes' changes, and the logits once they were built."""

    __slots__ = ("changes", "value")

    def __init__(self, changes: tuple[ClassChange, ...] = ()) -> None:
        self.changes = changes
        self.value: Tensor | None = None


class _Fields(NamedTuple):
    hidden: Tensor  # (*, H); the logits (*, V) themselves where head is None
    head: Head | None
    transform: Transform
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
        self, hidden: Tensor | None = None, transform: Transform | None = None, low_rank: Tensor | None = None
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
        hidden, self.head.low_rank_weight = kept_pair(hidden, weight)
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
            rows, columns = split_index(items, self.dim())
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
        return DeferredLogits(logits, None, Transform(logits.dtype, logits.shape[-1]), _Cell())
    hidden, head = met(module, hidden, tile_bytes, weight_as)
    return DeferredLogits(hidden, head, Transform(head.compute_dtype, head.n_classes), _Cell())
