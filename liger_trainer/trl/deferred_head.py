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

from ..patching import class_swap
from ..patching.deferred_logits import DeferredLogits, defer
from ..patching.sharding import is_lent, is_sharded, keep_whole, unwrapped

__all__ = ["HeadTensors", "check_head", "deferring_head", "head_tensors"]


class _StackedHead:
    """A head and the low-rank adapters on it as one product: ``[x, s A(x)]`` with ``[W, B]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


def _adapters(head: Any) -> list[str]:
    """The LoRA adapters of a peft layer that are in force."""
    if head.disable_adapters:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _dtype(linear: Any) -> torch.dtype:
    # Reading `weight` would have ZeRO-3 gather it and take it for one of the layer that runs just now.
    parameter = next(linear.parameters(), None)
    return unwrapped(linear).weight.dtype if parameter is None else parameter.dtype


def _weight(linear: Any) -> Tensor:
    """(V, R) weight of an adapter's second layer; what a framework has sharded comes out of the layer's own forward."""
    inner: Any = unwrapped(linear)
    parameter = next(linear.parameters(), None)
    if parameter is not None and not is_lent(parameter) and not is_sharded(linear):
        return inner.weight
    device = inner.weight.device if parameter is None else parameter.device
    one_row_a_rank = torch.eye(inner.in_features, dtype=_dtype(linear), device=device)
    return linear(one_row_a_rank).t()


def _stacked(head: Any, base: Any, hidden: Tensor) -> tuple[Any, Tensor]:
    weights, inputs = [base.weight], [hidden]
    for name in _adapters(head):
        a, b = head.lora_A[name], head.lora_B[name]
        dropped = head.lora_dropout[name](hidden.to(_dtype(a)))
        inputs.append((a(dropped) * head.scaling[name]).to(hidden.dtype))
        weights.append(_weight(b).to(base.weight.dtype))
    if len(weights) == 1:
        return base, hidden
    return _StackedHead(torch.cat(weights, 1), base.bias), torch.cat(inputs, -1)


def _is_plain(module: Any) -> bool:
    module = unwrapped(module)
    return (
        isinstance(module, nn.Linear)
        and class_swap.stock_class(module).forward is nn.Linear.forward
        and module.weight.is_floating_point()
    )


def _is_lora(head: Any) -> bool:
    return hasattr(head, "lora_A") and hasattr(head, "base_layer")


def _reason_against_lora(head: Any) -> str | None:
    if not _is_plain(head.base_layer):
        return f"its base layer is a {type(head.base_layer).__name__}, not a plain torch.nn.Linear"
    if getattr(head, "merged", False):
        return "its adapters are merged"
    for name in head.lora_A:
        if getattr(head, "use_dora", {}).get(name):
            return f"adapter {name!r} is a DoRA, which scales the merged weight"
        if not _is_plain(head.lora_A[name]) or not _is_plain(head.lora_B[name]):
            return f"adapter {name!r} is no pair of linear layers"
        if unwrapped(head.lora_B[name]).bias is not None:
            return f"adapter {name!r} has a bias"
    return None


def _inner(head: Any) -> Any:
    """What computes the logits inside of FSDP1's wrapper and behind peft's ``modules_to_save``."""
    head = unwrapped(head)
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = None if head.disable_adapters else head.active_adapter
        active = active[0] if isinstance(active, list) else active
        saved = head.modules_to_save
        return unwrapped(saved[active] if active in saved else head.original_module)
    return head


def check_head(model: Any) -> None:
    """Raise unless the head of ``model`` is one that :func:`deferring_head` can defer.

    Raises:
        ValueError: naming the head and what is against it.
    """
    outer = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    reason: str | None
    if not isinstance(outer, nn.Module):
        reason = "get_output_embeddings() gives no module"
    else:
        head = _inner(outer)
        if _is_lora(head):
            reason = _reason_against_lora(head)
        elif _is_plain(head):
            reason = None
        else:
            reason = f"it is a {type(head).__module__}.{type(head).__name__}, not a plain torch.nn.Linear"
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
def deferring_head(model: Any, tile_bytes: int | None = None) -> Iterator[None]:
    """Have the head of ``model`` return deferred logits in the forward that runs inside.

    Every layer of the head whose weight is used is called, so that a framework that shards it gathers it.
    """
    outer = model.get_output_embeddings()
    head = _inner(outer)
    options: Any = {"logits": None, "tile_bytes": tile_bytes, "weight_as": keep_whole(outer)}

    def forward(hidden: Tensor) -> DeferredLogits:
        if not _is_lora(head):
            return defer(head, hidden, **options)
        base = unwrapped(head.base_layer)
        with _forward_of(base, lambda hidden: defer(*_stacked(head, base, hidden), **options)):
            return head.base_layer(hidden)

    with _forward_of(head, forward):
        yield


class HeadTensors(NamedTuple):
    """What the logits of a forward are: ``options`` go to the kernels, hidden is (B, T, H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype
    logit_scale: float
    softcap: float | None

    def mean_of_logits(self, **options: Any) -> Tensor:
        """(B, T) means over the vocabulary of every position's logits, without gradient.

        Without a soft-cap it is the product with the mean row of the weight; else the logits are made in tiles.
        """
        from ..kernels import LogProbs, linear_log_probs

        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            if self.softcap is None:
                row = self.weight.mean(0, dtype=torch.float32)
                means = torch.mv(self.hidden.flatten(0, -2).float(), row).view(self.hidden.shape[:-1])
                if self.bias is not None:
                    means = means + self.bias.mean(dtype=torch.float32)
                return self.logit_scale * means
            everywhere = torch.zeros(self.hidden.shape[:-1], dtype=torch.long, device=self.hidden.device)
            scored = linear_log_probs(
                self.hidden,
                self.weight,
                everywhere,
                bias=self.bias,
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
    weight, bias = logits.head.tensors(logits.transform.n_classes)
    options = logits.transform.loss_options()
    return HeadTensors(
        logits.hidden, weight, bias, logits.head.compute_dtype, options["logit_scale"], options.get("softcap")
    )
