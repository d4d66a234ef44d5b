"""The LM head as one forward met it: its tensors for the fused loss, and for logits that are built after it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._dtypes import gradient_dtype
from ..kernels._vocabulary import VocabularyShard, local_head, replicated
from . import sharding
from .sharding import HeadWeight

__all__ = ["Head", "kept_pair", "met", "tensor_parallel_logits"]


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


def tensor_parallel_logits(module: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> Any:
    """The logits (\\*, V) of a head that ranks hold together, as a DTensor that is divided by classes."""
    from torch.distributed.tensor import DTensor, Replicate

    weight: Any = module.weight
    inputs = DTensor.from_local(hidden.to(dtype), weight.device_mesh, [Replicate()], run_check=False)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(inputs, weight.to(dtype), None if module.bias is None else module.bias.to(dtype))


def met(
    module: nn.Linear,
    hidden: Tensor,  # (*, H)
    tile_bytes: int | None,
    weight_as: HeadWeight,
) -> tuple[Tensor, Head]:
    """The head ``module`` with its tensors of this forward, and ``hidden`` as its products are to take it."""
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
    return hidden, head


def kept_pair(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(\\*, r) and (V, r) of an adapter's term, to be used when its forward is over."""
    # A framework that shards the weight takes its memory back before all logits are read, and it is small.
    copy = torch.distributed.is_available() and torch.distributed.is_initialized()
    # As the head's own: one node for both, where the weight's gradient has the weight's dtype.
    if torch.is_grad_enabled() and hidden.requires_grad and gradient_dtype(weight) == weight.dtype:
        hidden, weight, _ = _Tie.apply(hidden, weight, None, copy)
    elif copy:
        weight = weight.clone()
    return hidden, weight
