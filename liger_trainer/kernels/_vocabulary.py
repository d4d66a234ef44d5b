"""A head whose vocabulary is divided over the ranks of a group: what they tell each other, and how it is put together.

Each rank holds the logits of its own classes for the same rows. Of a row it sends a few numbers: the log-sum-exp of its
part, the label's logit if it has it, and what else a loss asks for. From those of all ranks each rank computes the same
statistics of the whole row, and so the gradient of its part. The gradient of the hidden states is the sum over ranks.
The division is Megatron-LM's (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053), which reduces maxima first and
sums then; a log-sum-exp a rank needs one exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtypes import accumulation_dtype
from ._log_prob_rows import RowStatistics, log_prob_rows
from ._softmax_loss import RowLoss

__all__ = [
    "SHARD_SCHEMA",
    "Part",
    "VocabularyShard",
    "is_divided_by_rows",
    "is_dtensor",
    "local_head",
    "local_low_rank",
    "replicated",
    "row_statistics",
    "sum_over_ranks",
]

# How an op's schema takes a VocabularyShard; for a whole head no group, 0, V and V.
SHARD_SCHEMA = "str? group, int first_class, SymInt n_all_classes, SymInt plan_classes"


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of a head this rank holds: ``n_classes`` in all, its own from ``first_class`` on.

    Attributes:
        group: the process group whose ranks hold the head together. All of them call an op alike: with the same hidden
            states, labels and options.
        n_classes: V, the size of the whole vocabulary.
        first_class: the class of this rank's first row.
        largest: the number of rows of the rank that has the most.
    """

    group: Any
    n_classes: int
    first_class: int
    largest: int

    @classmethod
    def even(cls, group: Any, n_classes: int) -> VocabularyShard:
        """The division of :func:`torch.chunk` and of ``DTensor``: ceil(V / p) rows a rank, the last ones fewer."""
        largest = -(-n_classes // group.size())
        return cls(group, n_classes, min(largest * group.rank(), n_classes), largest)

    def first(self, n_classes: int) -> VocabularyShard:
        """The shard of a head that ends after ``n_classes`` classes."""
        first_class = min(self.first_class, n_classes)
        return VocabularyShard(self.group, n_classes, first_class, min(self.largest, n_classes))

    def arguments(self) -> tuple[str, int, int, int]:
        """As the ops take it."""
        return self.group.group_name, self.first_class, self.n_classes, self.largest


class Part(NamedTuple):
    """A rank's classes inside an op."""

    group: str  # the process group's name
    first_class: int
    n_all_classes: int


def is_dtensor(tensor: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_divided_by_rows(tensor: Any) -> bool:
    """Whether it is a DTensor that is cut along its first dimension, on a mesh of one dimension."""
    if not is_dtensor(tensor) or tensor.device_mesh.ndim != 1:
        return False
    from torch.distributed.tensor import Shard

    return type(tensor.placements[0]) is Shard and tensor.placements[0].dim == 0


def local_head(
    weight: Any,  # (V, H), or this rank's (V_r, H)
    bias: Any,  # (V,) or (V_r,), or None
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """Weight and bias as plain tensors, and the shard that they are; None for a whole weight.

    Raises:
        ValueError: for a weight or bias that is a ``DTensor`` in another division than Shard(0) on a mesh of one
            dimension, of which only one is, or that comes with a ``shard`` too; for a weight with rows outside of it.
    """
    if is_dtensor(weight):
        if shard is not None:
            raise ValueError("vocab_shard goes with a plain weight, this rank's rows; got a DTensor")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not is_divided_by_rows(tensor):
                raise ValueError(
                    f"{name} must be divided on the vocabulary alone, a DTensor with Shard(0) on a mesh of one "
                    f"dimension, got {getattr(tensor, 'placements', 'a plain tensor')}; elsewhere pass this rank's "
                    "rows with vocab_shard"
                )
        shard = VocabularyShard.even(weight.device_mesh.get_group(), weight.shape[0])
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    if shard is not None:
        n = weight.shape[0] if weight.dim() else 0
        if shard.first_class + n > shard.n_classes or n > shard.largest:
            raise ValueError(
                f"weight must have rows of classes {shard.first_class} to {shard.n_classes} and at most "
                f"{shard.largest} of them, as vocab_shard says; got {tuple(weight.shape)}"
            )
    return weight, bias, shard


def replicated(tensor: Any) -> Tensor:
    """A tensor that is equal on every rank, as a plain one; the gradient that it gets is equal on every rank too."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = (Replicate(),)
    return tensor.redistribute(placements=whole).to_local(grad_placements=whole)


def local_low_rank(pair: tuple[Any, Any] | None) -> tuple[Tensor, Tensor] | None:
    """A divided head's low-rank term, (\\*, r) the same on every rank and this rank's (V_r, r), as plain tensors.

    Raises:
        ValueError: for a second tensor that is a ``DTensor`` in another division than :func:`local_head` takes.
    """
    if not isinstance(pair, tuple) or len(pair) != 2:
        return pair
    hidden, weight = pair
    if is_dtensor(weight):
        if not is_divided_by_rows(weight):
            raise ValueError(f"low_rank[1] must be divided as weight is, with Shard(0); got {weight.placements}")
        weight = weight.to_local()
    return replicated(hidden), weight


def _group(name: str) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def sum_over_ranks(part: Part | None, *gradients: Tensor) -> None:
    """Add up the ranks' parts of the hidden states' gradients, in place."""
    for gradient in gradients:
        if part is not None and gradient.numel():
            torch.distributed.all_reduce(gradient, group=_group(part.group))


def _gathered(values: Tensor, part: Part) -> Tensor:
    """(p, *) the ranks' values, in the order of the ranks."""
    group = _group(part.group)
    out = values.new_empty((group.size() * values.shape[0], *values.shape[1:]))
    torch.distributed.all_gather_into_tensor(out, values, group=group)
    return out.view(group.size(), *values.shape)


def row_statistics(
    logits: Tensor,  # (R, V_r)
    labels: Tensor,  # (R,)
    spec: RowLoss,
    part: Part,
    *,
    entropy: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
    best: bool = False,
    class_weights: Tensor | None = None,  # (V,)
    use_kernel: bool,
) -> tuple[Tensor, RowStatistics]:
    """(R,) the label's z and the statistics of whole rows, the same on every rank; one exchange.

    Rows whose label lies outside [0, V), or is not the same on every rank, are NaN; those of an ignored label hold
    nothing of meaning.
    """
    dtype = accumulation_dtype(logits.dtype)
    wanted = (True, True, entropy, mean_logits, log_sum_sq_probs, False, best, best)
    values = torch.zeros((sum(wanted), len(labels)), dtype=dtype, device=labels.device)
    unused = iter(values)
    own = RowStatistics(*(next(unused) if flag else None for flag in wanted))  # type: ignore[arg-type]
    if logits.shape[1] == 0:  # more ranks than classes
        own.log_probs.fill_(torch.inf)
        own.lse.fill_(-torch.inf)
        if own.best is not None:
            own.best.fill_(-torch.inf)
    log_prob_rows(
        logits,
        labels,
        spec,
        own,
        part=True,
        first_class=part.first_class,
        n_all_classes=part.n_all_classes,
        class_weights=class_weights,
        use_kernel=use_kernel,
    )
    of_ranks = iter(_gathered(values, part).unbind(1))
    ranks = RowStatistics(*(next(of_ranks) if flag else None for flag in wanted))  # type: ignore[arg-type]

    held = ranks.log_probs != torch.inf
    wrong = held.sum(0) != 1
    label_z = torch.where(held, ranks.log_probs, 0).sum(0).masked_fill(wrong, torch.nan)
    lse = torch.logsumexp(ranks.lse, 0).masked_fill(wrong, torch.nan)
    share = (ranks.lse - lse).exp()  # of the probability; NaN where a row is
    counts = share != 0

    def shared(values: Tensor) -> Tensor:
        return torch.where(counts, share * values, 0).sum(0)

    return label_z, RowStatistics(
        log_probs=label_z - lse,
        lse=lse,
        entropy=None if ranks.entropy is None else lse - shared(ranks.lse - ranks.entropy),
        mean_logits=None if ranks.mean_logits is None else ranks.mean_logits.sum(0).masked_fill(wrong, torch.nan),
        log_sum_sq_probs=(
            None
            if ranks.log_sum_sq_probs is None
            else torch.logsumexp(torch.where(counts, ranks.log_sum_sq_probs + 2 * (ranks.lse - lse), -torch.inf), 0)
        ),
        best_class=(
            None
            if ranks.best is None or ranks.best_class is None
            else ranks.best_class.gather(0, ranks.best.argmax(0, keepdim=True)).squeeze(0).long()
        ),
    )
