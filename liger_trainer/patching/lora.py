"""LoRA layers whose adapter's product is added to the frozen layer's output while it is made.

``y = W x + s (drop(x) A^T) B^T`` (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022,
https://arxiv.org/abs/2106.09685). peft makes the product with ``B``, scales it and adds it to ``W x``: two more passes
over numbers as many as the layer puts out, and one in the backward, which scales the gradient. Here the product
accumulates in ``W x`` with the factor inside, and the backward's factor is on ``r`` columns. That rounds once where
peft's operations round three times.

Dropout, ``A`` and the frozen layer are called as the modules that they are. Whatever is not one plain adapter (several,
DoRA, a merged one, a batch with rows of different adapters) goes through peft's own forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels._library import refuse_double_backward
from .adapters import adapters_in_force, is_lora, is_plain, reason_against_adapters, variant
from .class_swap import stock_class
from .forwards import renamed_like
from .options import Options
from .probe import Call, Noise, compute_device, difference, probe_dtypes, quiet, shadow, training_dtype
from .recogniser import ClassSwap, Finding, Skip

__all__ = ["recognise"]

KIND = "lora"


class _AddLowRank(torch.autograd.Function):
    """``y += s a B^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # (*, F), contiguous and no view, to autograd
        a: Tensor,  # (*, r)
        b: Tensor,  # (F, r)
        scaling: float,
    ) -> Tensor:
        a = a.reshape(-1, a.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(a, b.t(), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(a, b)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        refuse_double_backward("lora")
        (dy,) = gradients
        a, b = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        da = (rows @ b).mul_(ctx.scaling).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        db = rows.t() @ (a * ctx.scaling) if ctx.needs_input_grad[2] else None
        return dy, da, db, None


def _add_low_rank(
    y: Tensor,  # (*, F)
    a: Tensor,  # (*, r)
    b: Tensor,  # (F, r)
    scaling: float,
    own: bool,  # whether nobody else has y
) -> Tensor:
    # Adding to a view would cost a copy of the gradient; a layer with a bias returns one.
    if own and y.is_contiguous() and not y._is_view():
        added: Tensor = _AddLowRank.apply(y, a, b, scaling)
        return added
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), a.reshape(-1, a.shape[-1]), b.t(), alpha=scaling)
    return rows.view(y.shape)


def _adapter(layer: Any) -> str | None:
    """The adapter whose product can be added here; None where peft's own forward has to serve."""
    names = adapters_in_force(layer)
    if len(names) != 1 or variant(layer, names[0]) is not None or torch.compiler.is_compiling():
        return None
    b = layer.lora_B[names[0]]
    weight = b.weight
    here = type(weight) in (nn.Parameter, Tensor) and weight.numel() == b.in_features * b.out_features
    hooks = b._forward_hooks or b._forward_pre_hooks  # a framework that brings the weight when the layer is called
    return names[0] if here and type(b) is nn.Linear and b.bias is None and not hooks else None


def _compute(layer: Any, name: str, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    a_layer, b_layer = layer.lora_A[name], layer.lora_B[name]
    drop, scaling = layer.lora_dropout[name], layer.scaling[name]
    autocast = torch.is_autocast_enabled(x.device.type)
    # Autocast would take the cast back: without a dropout, that draws by dtype, there is no difference.
    if not autocast or (not isinstance(drop, nn.Identity) and layer.training):
        x = layer._cast_input_dtype(x, a_layer.weight.dtype)
    a: Tensor = a_layer(drop(x))
    b = b_layer.weight
    if a.dtype != y.dtype or not (autocast or b.dtype == y.dtype) or b.device != y.device:
        return (y + b_layer(a) * scaling).to(y.dtype)
    base = layer.base_layer
    own = is_plain(base) and not base._forward_hooks and "forward" not in vars(base)
    return _add_low_rank(y, a, b.to(y.dtype), scaling, own)


@functools.cache
def _members(stock: Any) -> dict[str, Any]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = None if args or kwargs else _adapter(self)
        return stock.forward(self, x, *args, **kwargs) if name is None else _compute(self, name, x)

    return {"forward": renamed_like(forward, stock.forward)}


def recognise(model: nn.Module, options: Options) -> Iterator[Finding]:
    """Find peft's LoRA layers around linear layers; see :class:`liger_trainer.patching.recogniser.Recogniser`.

    A language-model head is left to the fused loss, which takes the adapter's term for itself.
    """
    peft: Any = sys.modules.get("peft.tuners.lora.layer")
    if not options.lora or peft is None:
        return
    heads = {id(_head(module)) for module in model.modules()}
    device = compute_device(list(model.parameters()))
    known: dict[Any, str | None] = {}
    for path, module in model.named_modules():
        if not is_lora(module) or id(module) in heads or not isinstance(module, nn.Module):
            continue
        stock = stock_class(module)
        reason = reason_against_adapters(module, (None,))
        if stock.forward is not peft.Linear.forward or not is_plain(module.base_layer):
            reason = "its frozen layer is not a plain linear layer"
        if reason is None and options.check:
            key = (stock, *((p.shape, p.dtype) for p in module.parameters()))
            if key not in known:
                known[key] = _verify(module, device)
            reason = known[key]
        if reason is not None:
            yield Skip(KIND, path, stock.__name__, reason)
            continue
        yield ClassSwap(
            KIND,
            path,
            "low-rank addition",
            module,
            functools.partial(_members, stock),
            probe_dtypes(_adapter_parameters(module)) if options.check else (),
            None,
            functools.partial(_verify, module, device),
        )


def _head(module: Any) -> Any:
    """The head of a language model; None of any other module."""
    get: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


class _OneColumn(nn.Linear):
    """A linear layer all of whose outputs are one number a row, whose weight takes no room."""

    def __init__(self, row: Tensor, out_features: int) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = row.shape[0], out_features
        self.weight = nn.Parameter(row.expand(out_features, -1), requires_grad=False)


def _verify(layer: Any, device: torch.device) -> str | None:
    """How a layer's forward differs from peft's, on random input; None where it does not."""
    stock = stock_class(layer)
    base = layer.base_layer
    trained = training_dtype(list(base.parameters()))
    with quiet(device):
        for dtype in dict.fromkeys([trained, torch.bfloat16, torch.float32]):
            noise = Noise(device)
            row = noise.normal(base.in_features, dtype=dtype, scale=base.in_features**-0.5)
            copied = shadow(layer, {"base_layer": _OneColumn(row, base.out_features)}).eval()
            for part in (copied.lora_A, copied.lora_B):
                part.to(dtype)
                for parameter in part.requires_grad_().parameters():  # B is zero at first
                    parameter.data = noise.normal(*parameter.shape, dtype=dtype, scale=parameter.shape[-1] ** -0.5)
            x = noise.rows(10, base.in_features, dtype=dtype).requires_grad_()
            weights = _adapter_parameters(copied)
            ours = Call.of(functools.partial(_members(stock)["forward"], copied), [x], weights)
            theirs = Call.of(functools.partial(stock.forward, copied), [x], weights)
            reason = difference(ours, theirs, f"in {dtype}")
            if reason is not None:
                return reason.replace("torch.", "")
    return None
