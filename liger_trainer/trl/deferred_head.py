"""A causal model's head as two tensors: the hidden states and the weight whose product the logits would be.

For the time of one forward the head returns :class:`~liger_trainer.patching.deferred_logits.DeferredLogits`. The rest
of the model's own forward runs as it is, so whatever the model does to its logits (a scale, a soft-cap) is recorded
from its code and not read from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching.adapters import is_lora, serving_module
from ..patching.deferred_logits import DeferredLogits, defer
from ..patching.sharding import keep_whole, unwrapped
from .affine_head import product, reason_against

__all__ = ["HeadTensors", "check_head", "deferring_head", "head_tensors"]


def check_head(model: Any) -> None:
    """Raise unless the head of ``model`` is one that :func:`deferring_head` can defer.

    Raises:
        ValueError: naming the head and what is against it.
    """
    outer = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    if isinstance(outer, nn.Module):
        reason = reason_against(serving_module(outer), model.dtype)
    else:
        reason = "get_output_embeddings() gives no module"
    if reason is not None:
        raise ValueError(
            f"the LM head of {type(model).__name__} can't do without its logits: {reason}. Set use_liger=False, or use "
            "TRL's own trainer."
        )


@contextmanager
def _forward_of(module: Any, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def deferring_head(model: Any, tile_bytes: int | None = None) -> Iterator[list[Any]]:
    """Have the head of ``model`` return deferred logits in the forward that runs inside.

    Every layer of the head whose weight is used is called, so that a framework that shards it gathers it.

    Yields:
        A list that comes to hold what these logits are products with, which they themselves do not keep alive.
    """
    outer = model.get_output_embeddings()
    head = serving_module(outer)
    base = unwrapped(head.base_layer) if is_lora(head) else head
    own = base.forward
    options: Any = {"logits": None, "tile_bytes": tile_bytes, "weight_as": keep_whole(outer)}
    met: list[Any] = []

    def deferred(hidden: Tensor) -> DeferredLogits:
        made = product(head, hidden, own)
        met.append(made.layer)
        logits = defer(made.layer, made.hidden, **options)
        return logits if made.low_rank is None else logits.with_low_rank(*made.low_rank)

    def forward(hidden: Tensor) -> DeferredLogits:
        if base is head:
            return deferred(hidden)
        with _forward_of(base, deferred):
            return head.base_layer(hidden)

    with _forward_of(head, forward):
        yield met


def _mean_products(hidden: Tensor, weight: Tensor) -> Tensor:
    """(\\*) means over the rows of ``weight`` (V, H) of their products with (\\*, H) hidden states."""
    row = weight.mean(0, dtype=torch.float32)
    return torch.mv(hidden.flatten(0, -2).float(), row).view(hidden.shape[:-1])


class HeadTensors(NamedTuple):
    """What the logits of a forward are: ``options`` go to the kernels, hidden is (B, T, H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype
    logit_scale: float
    softcap: float | None
    low_rank: tuple[Tensor, Tensor] | None = None  # (B, T, r) and (V, r)

    def last(self, length: int) -> HeadTensors:
        """Those of the last ``length`` positions: what prompt learning puts before the tokens is none of theirs."""
        low_rank = None if self.low_rank is None else (self.low_rank[0][:, -length:], self.low_rank[1])
        return self._replace(hidden=self.hidden[:, -length:], low_rank=low_rank)

    def mean_of_logits(self, **options: Any) -> Tensor:
        """(B, T) means over the vocabulary of every position's logits, without gradient.

        Without a soft-cap it is the product with the mean row of the weight; else the logits are made in tiles.
        """
        from ..kernels import LogProbs, linear_log_probs

        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            if self.softcap is None:
                means = _mean_products(self.hidden, self.weight)
                if self.low_rank is not None:
                    means = means + _mean_products(*self.low_rank)
                if self.bias is not None:
                    means = means + self.bias.mean(dtype=torch.float32)
                return self.logit_scale * means
            everywhere = torch.zeros(self.hidden.shape[:-1], dtype=torch.long, device=self.hidden.device)
            scored = linear_log_probs(
                self.hidden,
                self.weight,
                everywhere,
                bias=self.bias,
                low_rank=self.low_rank,
                outputs=("mean_logits",),
                max_valid=everywhere.numel(),
                compute_dtype=self.compute_dtype,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                **options,
            )
            assert isinstance(scored, LogProbs) and scored.mean_logits is not None
            return scored.mean_logits


def head_tensors(logits: Any, owner: Callable[..., Any] | nn.Module) -> HeadTensors:
    """Take deferred logits apart.

    Raises:
        RuntimeError: where the model's own forward has used its logits in a way that needed them built.
    """
    if not isinstance(logits, DeferredLogits) or logits.cell.value is not None or logits.head is None:
        raise RuntimeError(
            f"the forward of {type(owner).__name__} builds its logits to compute with them, so that a loss can't do "
            "without them. Set use_liger=False, or use TRL's own trainer."
        )
    if logits.head.shard is not None:
        raise RuntimeError(
            f"the LM head of {type(owner).__name__} is tensor-parallel, which this loss does not support. Set "
            "use_liger=False, or leave lm_head out of the tensor-parallel plan."
        )
    weight, bias = logits.rows()
    options = logits.transform.loss_options()
    return HeadTensors(
        logits.hidden,
        weight,
        bias,
        logits.head.compute_dtype,
        options["logit_scale"],
        options.get("softcap"),
        logits.low_rank_term(),
    )
