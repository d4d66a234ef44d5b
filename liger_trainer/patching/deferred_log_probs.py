"""What of deferred logits comes from the fused ops: a class's log-probability, and the likeliest class.

Their log-softmax is an object of its own. What a loss gathers of it comes from the fused op, anything else builds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import CrossEntropyOutput, linear_cross_entropy, linear_log_probs

if TYPE_CHECKING:
    from .deferred_logits import DeferredLogits

__all__ = ["DeferredLogProbs", "likeliest_classes"]


def _capped_the_other_way(logits: DeferredLogits) -> bool:
    return logits.transform.capped and not logits.transform.outer > 0


def likeliest_classes(logits: DeferredLogits) -> Tensor | None:
    """(\\*) the class of each row's largest logit, without logits; None where these exist or must be built."""
    if logits.cell.value is not None or logits.head is None or _capped_the_other_way(logits):
        return None
    weight, bias = logits.rows()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    with torch.no_grad():
        output = linear_cross_entropy(
            logits.hidden,
            weight,
            labels,
            bias=bias,
            low_rank=logits.low_rank_term(),
            reduction="sum",
            outputs=("predicted_tokens",),
            max_valid=labels.numel(),
            tile_bytes=logits.head.tile_bytes,
            compute_dtype=logits.head.compute_dtype,
            vocab_shard=logits.head.shard_of(logits.transform.n_classes),
            **logits.transform.loss_options(),
        )
    assert isinstance(output, CrossEntropyOutput) and output.predicted_tokens is not None
    return output.predicted_tokens


class DeferredLogProbs:
    """``log_softmax(logits, -1)`` of logits (\\*, V) that are not there yet."""

    def __init__(self, logits: DeferredLogits, dtype: torch.dtype) -> None:
        self._logits = logits
        self._dtype = dtype
        self._value: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self._logits.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def materialize(self) -> Tensor:
        if self._value is None:
            self._value = torch.log_softmax(self._logits.materialize(), -1, dtype=self._dtype)
        return self._value

    def gather(self, dim: int, index: Tensor, **options: Any) -> Tensor:
        """The log-probabilities of one class a row, without logits; any other gather builds them."""
        logits = self._logits
        last = dim in (-1, len(self.shape) - 1)
        one_class_a_row = index.dim() == len(self.shape) and index.shape == (*self.shape[:-1], 1)
        if (
            self._value is not None
            or logits.cell.value is not None
            or logits.head is None
            or not (last and one_class_a_row)
            or _capped_the_other_way(logits)
            or options
        ):
            return self.materialize().gather(dim, index, **options)
        weight, bias = logits.rows()
        labels = index.squeeze(-1)
        log_probs = linear_log_probs(
            logits.hidden,
            weight,
            labels,
            bias=bias,
            low_rank=logits.low_rank_term(),
            max_valid=labels.numel(),
            tile_bytes=logits.head.tile_bytes,
            compute_dtype=logits.head.compute_dtype,
            vocab_shard=logits.head.shard_of(logits.transform.n_classes),
            **logits.transform.loss_options(),
        )
        assert isinstance(log_probs, Tensor)
        return log_probs.to(self._dtype).unsqueeze(-1)

    def nll_loss(self, target: Tensor, *args: Any, **options: Any) -> Tensor:
        """What :func:`torch.nn.functional.nll_loss` takes of log-probabilities (N, V): without logits."""
        if self._value is not None or len(self.shape) != 2:
            return F.nll_loss(self.materialize(), target, *args, **options)
        logits = self._logits.to(self._dtype)
        if isinstance(logits, Tensor):
            return F.cross_entropy(logits, target, *args, **options)
        return logits.unsmoothed_cross_entropy(target, *args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.materialize(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize()[index]

    def __neg__(self) -> Tensor:
        return -self.materialize()

    def __mul__(self, other: Any) -> Tensor:
        return self.materialize() * other

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Tensor:
        return self.materialize() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return self.materialize() - other

    def __rsub__(self, other: Any) -> Tensor:
        return other - self.materialize()

    def __truediv__(self, other: Any) -> Tensor:
        return self.materialize() / other

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _RECORDED.get(func)
        if name is not None and args and isinstance(args[0], DeferredLogProbs):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*map(_built, args), **{name: _built(value) for name, value in kwargs.items()})


_RECORDED: dict[Callable[..., Any], str] = {torch.gather: "gather", F.nll_loss: "nll_loss"}


def _built(value: Any) -> Any:
    if isinstance(value, DeferredLogProbs):
        return value.materialize()
    return type(value)(map(_built, value)) if type(value) in (tuple, list) else value
