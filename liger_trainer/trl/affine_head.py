"""A language-model head, with whatever peft or a quantiser has put around it, as one product.

Every head that is affine in the hidden states is a weight and a bias, over the hidden states or over these and further
columns. A plain linear layer hands out its own. Adapters are further columns: ``[x, s A(x)]`` with ``[W, B]``. Where
a weight is nowhere to be read (a quantised layer, another kind of adapter), the module's own forward says it: its
outputs for the identity matrix are the weight's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import class_swap
from ..patching.sharding import is_lent, is_sharded, unwrapped

__all__ = ["AffineHead", "is_lora", "is_plain", "reason_against", "serving_module", "stacked"]


class AffineHead:
    """What stands in a linear layer's place: ``weight`` (V, H') and ``bias`` (V,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


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


def _trains_tokens(head: Any) -> bool:
    return hasattr(head, "token_adapter")


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


def _adapters(head: Any) -> list[str]:
    """The LoRA adapters of a peft layer that are in force."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _variant(head: Any, name: str) -> str | None:
    """What kind of LoRA an adapter is, by the name of peft's class; None for the plain one."""
    variant = getattr(head, "lora_variant", {}).get(name)
    return None if variant is None else getattr(variant, "__name__", type(variant).__name__)


def _dtype(linear: Any) -> torch.dtype:
    # Reading `weight` would have ZeRO-3 gather it and take it for one of the layer that runs just now.
    parameter = next(linear.parameters(), None)
    inner: Any = unwrapped(linear)
    return inner.weight.dtype if parameter is None else parameter.dtype


def _weight(linear: Any) -> Tensor:
    """(V, R) weight of an adapter's second layer; what a framework has sharded comes out of the layer's own forward."""
    inner: Any = unwrapped(linear)
    parameter = next(linear.parameters(), None)
    if parameter is not None and not is_lent(parameter) and not is_sharded(linear):
        return inner.weight
    device = inner.weight.device if parameter is None else parameter.device
    one_row_a_rank = torch.eye(inner.in_features, dtype=_dtype(linear), device=device)
    columns = linear(one_row_a_rank)
    return (columns if inner.bias is None else columns - inner.bias).t()


def _of_identity(forward: Callable[[Tensor], Tensor], width: int, like: Tensor, biased: bool) -> AffineHead:
    outputs = forward(torch.eye(width, dtype=like.dtype, device=like.device))
    if not biased:
        return AffineHead(outputs.t(), None)
    bias = forward(like.new_zeros(1, width))
    return AffineHead((outputs - bias).t(), bias.squeeze(0))


def _dora_weight(head: Any, name: str, base: Any) -> Tensor:
    """(V, H) what a DoRA adds to the weight of its base layer, by peft's own code."""
    a = head.lora_A[name]
    inner: Any = unwrapped(a)
    dtype = _dtype(a)
    return head.lora_magnitude_vector[name](
        torch.eye(inner.in_features, dtype=dtype, device=base.weight.device),
        lora_A=a,
        lora_B=head.lora_B[name],
        scaling=head.scaling[name],
        base_layer=head.get_base_layer(),
        base_result=base.weight.t().to(dtype) if base.bias is None else None,
        adapter_name=name,
    ).t()


def stacked(head: Any, hidden: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Tensor]:
    """The layer whose product with the returned hidden states, (\\*, H'), is ``head(hidden)`` for (\\*, H) ones.

    Gradients reach all that the head trains. Only what :func:`reason_against` finds nothing against may be given.

    Args:
        head: the module, :func:`serving_module` applied.
        hidden: what it is given.
        forward: its own forward, or with LoRA adapters that of its base layer, where another stands in its place.
    """
    if is_plain(head):
        return unwrapped(head), hidden
    if _trains_tokens(head):
        in_force = not head.disable_adapters and bool(head.active_adapters)
        # peft's forward of trained tokens leaves the bias out.
        return AffineHead(head.weight, None if in_force else head.original_module.bias), hidden
    if not is_lora(head):
        biased = isinstance(getattr(head, "bias", None), Tensor)
        return _of_identity(forward or head, hidden.shape[-1], hidden.detach(), biased), hidden
    base, columns = stacked(unwrapped(head.base_layer), hidden, forward)
    weights, inputs, bias = [base.weight], [columns], base.bias
    for name in _adapters(head):
        a, b, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
        dropped = dropout(hidden.to(_dtype(a)))
        if _variant(head, name) is None:
            inputs.append((a(dropped) * head.scaling[name]).to(hidden.dtype))
            weights.append(_weight(b).to(base.weight.dtype))
            inner: Any = unwrapped(b)
            if inner.bias is not None:
                shift = head.scaling[name] * inner.bias
                bias = shift if bias is None else bias + shift
        elif isinstance(dropout, nn.Identity) or not head.training:
            weights[0] = (weights[0] + _dora_weight(head, name, base)).to(base.weight.dtype)
        else:  # what it adds is of other, dropped, hidden states
            inputs.append(dropped.to(hidden.dtype))
            weights.append(_dora_weight(head, name, base).to(base.weight.dtype))
    if len(weights) == 1 and weights[0] is base.weight and bias is base.bias:
        return base, columns
    if len(weights) == 1:
        return AffineHead(weights[0], bias), columns
    return AffineHead(torch.cat(weights, 1), bias), torch.cat(inputs, -1)


def reason_against(head: Any, dtype: torch.dtype) -> str | None:
    """Why :func:`stacked` can't serve ``head``, whose hidden states have ``dtype``, or None."""
    if is_plain(head):
        return None
    if _trains_tokens(head):
        base = head.original_module
        return None if is_plain(base) else f"tokens are trained on a {type(base).__name__}, not a torch.nn.Linear"
    if is_lora(head):
        return _reason_against_lora(head, dtype)
    kind = f"it is a {type(head).__module__}.{type(head).__name__}"
    for module in head.modules():
        if "Dropout" in type(module).__name__ and bool(getattr(module, "p", 0)):
            return f"{kind}, whose dropout makes another weight for every token"
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        return f"{kind}, which has no in_features"
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in head.parameters()):
        return None  # a shard, which can't be tried here
    difference = _difference_from_product(head, width, dtype)
    if not difference < (1e-4 if dtype.itemsize > 2 else 3e-2):
        return f"{kind}, whose outputs differ from the product with any one weight, by {difference:.1e}"
    return None


def _reason_against_lora(head: Any, dtype: torch.dtype) -> str | None:
    reason = reason_against(head.base_layer, dtype)
    if reason is not None:
        return f"under its adapters {reason}"
    for name in head.lora_A:
        variant = _variant(head, name)
        if variant not in (None, "DoraLinearVariant"):
            return f"adapter {name!r} is a {variant}, neither a LoRA nor a DoRA"
        if not is_plain(head.lora_A[name]) or not is_plain(head.lora_B[name]):
            return f"adapter {name!r} is no pair of linear layers"
    return None


def _difference_from_product(head: Any, width: int, dtype: torch.dtype) -> float:
    """How far, relative to the whole, the head's outputs for some hidden states are from those of its weight."""
    device = next((each.device for each in (*head.parameters(), *head.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((5, width), generator=generator).to(device, dtype)
    with torch.no_grad():
        product, _ = stacked(head, hidden)
        expected = head(hidden).double()
        found = nn.functional.linear(
            hidden.double(), product.weight.double(), None if product.bias is None else product.bias.double()
        )
    return float((found - expected).norm() / expected.norm())
