"""LoRA adapters that peft has put around a language-model head: what they add to its logits, and which head serves.

``logits = x W^T + s (drop(x) A^T) B^T``: an adapter is a low-rank term ``a B^T`` whose hidden states ``a`` come out of
peft's own layers, dropout, casts and all; only the product with ``B`` is the fused losses'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._vocabulary import is_dtensor
from . import class_swap
from .probe import Noise, quiet
from .sharding import is_lent, is_sharded, unwrapped

__all__ = [
    "adapted_layer",
    "adapters_in_force",
    "difference_of_adapters",
    "first_dtype",
    "is_lora",
    "is_plain",
    "linear_of",
    "low_rank_term",
    "reason_against_adapters",
    "serving_module",
    "variant",
]


def is_plain(module: Any) -> bool:
    """Whether a module is a linear layer and nothing else, patched, sharded or not."""
    module = unwrapped(module)
    return (
        isinstance(module, nn.Linear)
        and class_swap.stock_class(module).forward is nn.Linear.forward
        and module.weight.is_floating_point()
    )


def is_lora(head: Any) -> bool:
    """Whether a module is a layer of peft's with LoRA adapters."""
    return hasattr(head, "lora_A") and hasattr(head, "base_layer")


def serving_module(head: Any) -> Any:
    """What computes the logits inside of FSDP1's wrapper and behind peft's ``modules_to_save``."""
    head = unwrapped(head)
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = None if head.disable_adapters else head.active_adapter
        active = active[0] if isinstance(active, list) else active
        saved = head.modules_to_save
        chosen = saved[active] if active in saved else head.original_module  # noqa: SIM401  a ModuleDict has no get
        return unwrapped(chosen)
    return head


def linear_of(head: Any) -> Any:
    """The layer that multiplies with the head's weight: the serving one, or that under its LoRA adapters."""
    serving = serving_module(head)
    return unwrapped(serving.base_layer) if is_lora(serving) else serving


def adapted_layer(head: Any) -> Any:
    """The peft layer with LoRA adapters that serves as the head; None without one."""
    serving = serving_module(head)
    return serving if is_lora(serving) else None


def adapters_in_force(head: Any) -> list[str]:
    """The LoRA adapters of a peft layer that take part in its forward."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def variant(head: Any, name: str) -> str | None:
    """What kind of LoRA an adapter is, by the name of peft's class; None for the plain one."""
    kind = getattr(head, "lora_variant", {}).get(name)
    return None if kind is None else getattr(kind, "__name__", type(kind).__name__)


def first_dtype(linear: Any) -> torch.dtype:
    """The dtype of a linear layer's parameters, which may be sharded."""
    # Reading `weight` would have ZeRO-3 gather it and take it for one of the layer that runs just now.
    parameter = next(linear.parameters(), None)
    inner: Any = unwrapped(linear)
    return inner.weight.dtype if parameter is None else parameter.dtype


def _weight(linear: Any) -> Tensor:
    """(V, r) weight of an adapter's second layer; what a framework has sharded comes out of the layer's own forward."""
    inner: Any = unwrapped(linear)
    parameter = next(linear.parameters(), None)
    if parameter is not None and not is_lent(parameter) and not is_sharded(linear):
        return inner.weight
    device = inner.weight.device if parameter is None else parameter.device
    one_row_a_rank = torch.eye(inner.in_features, dtype=first_dtype(linear), device=device)
    columns = linear(one_row_a_rank)
    return (columns if inner.bias is None else columns - inner.bias).t()


def low_rank_term(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the plain LoRA adapters in force on a peft layer add to its logits: (\\*, r) and (V, r), or None.

    The second is the parameter itself where one adapter without a bias is in force. Several are side by side, and a
    bias is the column of an input that is 1.

    Args:
        head: a peft layer that :func:`is_lora` knows.
        hidden: (\\*, H) what it is given.
    """
    inputs, weights = [], []
    for name in adapters_in_force(head):
        if variant(head, name) is not None:
            continue
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        inputs.append(a(head.lora_dropout[name](hidden.to(first_dtype(a)))) * scaling)
        weights.append(_weight(b))
        inner: Any = unwrapped(b)
        if inner.bias is not None:
            inputs.append(torch.full_like(inputs[-1][..., :1], scaling))
            weights.append(inner.bias.unsqueeze(1))
    if not inputs:
        return None
    return (inputs[0], weights[0]) if len(inputs) == 1 else (torch.cat(inputs, -1), torch.cat(weights, 1))


def reason_against_adapters(head: Any, served: tuple[str | None, ...]) -> str | None:
    """Why an adapter of a peft layer is none of the ``served`` variants, or no pair of linear layers; or None."""
    for name in head.lora_A:
        kind = variant(head, name)
        if kind not in served:
            expected = "neither a LoRA nor a DoRA" if len(served) > 1 else "not a plain LoRA"
            return f"adapter {name!r} is a {kind}, {expected}"
        if not is_plain(head.lora_A[name]) or not is_plain(head.lora_B[name]):
            return f"adapter {name!r} is no pair of linear layers"
    return None


def difference_of_adapters(head: Any) -> str | None:
    """How a peft layer's own forward differs from its base layer's and :func:`low_rank_term`, on random input; or None.

    Nothing is said of a layer whose parameters are not here, or whose forward would unmerge them.
    """
    linear: Any = unwrapped(head.base_layer)
    weights = [linear.weight, *head.parameters()]
    elsewhere = is_sharded(head) or any(each.is_meta or is_dtensor(each) or not each.numel() for each in weights)
    # FSDP1 makes one-dimensional parts of what a unit farther out has.
    linears: list[Any] = [unwrapped(each) for each in (linear, *head.lora_A.values(), *head.lora_B.values())]
    elsewhere = elsewhere or any(each.weight.dim() != 2 for each in linears)
    if elsewhere or is_lent(linear.weight) or (head.disable_adapters and head.merged):
        return None
    device, dtype = linear.weight.device, linear.weight.dtype
    with quiet(device), torch.no_grad():
        hidden = Noise(device).normal(3, linear.in_features, dtype=dtype)
        torch.manual_seed(0)  # of the dropout
        expected = head.forward(hidden).double()
        torch.manual_seed(0)
        found = linear.forward(hidden).double()
        term = low_rank_term(head, hidden)
        if term is not None:
            found = found + F.linear(*(each.double() for each in term))
        difference = float((found - expected).norm() / expected.norm())
    tolerance = 1e-4 if dtype.itemsize > 2 else 3e-2
    if not difference < tolerance:
        return (
            f"its logits differ from its base layer's and its adapters' by {difference:.1e}, more than {tolerance:.0e}"
        )
    return None
