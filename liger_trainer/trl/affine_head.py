"""A language-model head, with whatever peft or a quantiser has put around it, as a product.

Every head that is affine in the hidden states is a weight and a bias. A plain linear layer hands out its own. LoRA
adapters are a second product of their rank, beside a weight that nobody copies. A DoRA is a weight of its own: it
divides the logits of each class by the norm of a whole row of ``W + s B A``. Where a weight is nowhere to be read (a
quantised layer, another kind of adapter), the module's own forward says it: its outputs for the identity matrix are
the weight's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching.adapters import (
    adapters_in_force,
    first_dtype,
    is_lora,
    is_plain,
    low_rank_term,
    reason_against_adapters,
    variant,
)
from ..patching.sharding import unwrapped

__all__ = ["AffineHead", "Product", "product", "reason_against"]


class AffineHead:
    """What stands in a linear layer's place: ``weight`` (V, H') and ``bias`` (V,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


def _trains_tokens(head: Any) -> bool:
    return hasattr(head, "token_adapter")


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
    dtype = first_dtype(a)
    return head.lora_magnitude_vector[name](
        torch.eye(inner.in_features, dtype=dtype, device=base.weight.device),
        lora_A=a,
        lora_B=head.lora_B[name],
        scaling=head.scaling[name],
        base_layer=head.get_base_layer(),
        base_result=base.weight.t().to(dtype) if base.bias is None else None,
        adapter_name=name,
    ).t()


class Product(NamedTuple):
    """A head's logits for some hidden states: ``hidden @ layer.weight.T + layer.bias``, plus ``a @ b.T``."""

    layer: Any  # has weight (V, H') and bias (V,) or None
    hidden: Tensor  # (*, H')
    low_rank: tuple[Tensor, Tensor] | None = None  # a (*, r) and b (V, r)


def product(head: Any, hidden: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Product:
    """What ``head(hidden)`` is for (\\*, H) hidden states, without computing it.

    Gradients reach all that the head trains. Only what :func:`reason_against` finds nothing against may be given.

    Args:
        head: the module, :func:`serving_module` applied.
        hidden: what it is given.
        forward: its own forward, or with LoRA adapters that of its base layer, where another stands in its place.
    """
    if is_plain(head):
        return Product(unwrapped(head), hidden)
    if _trains_tokens(head):
        in_force = not head.disable_adapters and bool(head.active_adapters)
        # peft's forward of trained tokens leaves the bias out.
        return Product(AffineHead(head.weight, None if in_force else head.original_module.bias), hidden)
    if not is_lora(head):
        biased = isinstance(getattr(head, "bias", None), Tensor)
        return Product(_of_identity(forward or head, hidden.shape[-1], hidden.detach(), biased), hidden)
    base = product(unwrapped(head.base_layer), hidden, forward)
    return _with_doras(head, hidden, base)._replace(low_rank=low_rank_term(head, hidden))


def _with_doras(head: Any, hidden: Tensor, base: Product) -> Product:
    """With the adapters in force that rescale the rows of the weight, of which there is no low-rank term."""
    layer = base.layer
    weights, inputs = [layer.weight], [base.hidden]
    for name in adapters_in_force(head):
        if variant(head, name) is None:
            continue
        dropout, added = head.lora_dropout[name], _dora_weight(head, name, layer)
        if isinstance(dropout, nn.Identity) or not head.training:
            weights[0] = (weights[0] + added).to(layer.weight.dtype)
        else:  # what it adds is of other, dropped, hidden states
            inputs.append(dropout(hidden.to(first_dtype(head.lora_A[name]))).to(hidden.dtype))
            weights.append(added.to(layer.weight.dtype))
    if len(weights) > 1:
        return Product(AffineHead(torch.cat(weights, 1), layer.bias), torch.cat(inputs, -1))
    return base if weights[0] is layer.weight else Product(AffineHead(weights[0], layer.bias), base.hidden)


def reason_against(head: Any, dtype: torch.dtype) -> str | None:
    """Why :func:`product` can't serve ``head``, whose hidden states have ``dtype``, or None."""
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
    return reason_against_adapters(head, served=(None, "DoraLinearVariant"))


def _difference_from_product(head: Any, width: int, dtype: torch.dtype) -> float:
    """How far, relative to the whole, the head's outputs for some hidden states are from those of its weight."""
    device = next((each.device for each in (*head.parameters(), *head.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((5, width), generator=generator).to(device, dtype)
    with torch.no_grad():
        layer = product(head, hidden).layer
        expected = head(hidden).double()
        found = nn.functional.linear(
            hidden.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )
    return float((found - expected).norm() / expected.norm())
