"""What sharding frameworks do to the weight of an LM head, and how it stays whole until the loss.

Deferred logits read the head's weight after the head's own forward. A framework that shards the weight by a unit around
the model, as is usual, frees it at the end of the model's forward or in the backward, which is late enough. One that
has a unit around the head alone, or around head and final norm, may free it at the end of the head's forward. Two
things help, and neither gathers anything:

- FSDP2's unit is told to keep what it has gathered until the backward, which follows at once: FSDP2 does so for the
  root of a model, and accelerate for head and final norm, since the backward would gather it again;
- FSDP1 has no such setting. There the head hands out a copy of its weight, which lives as long as the loss needs it.

DeepSpeed's ZeRO-3 replaces the tensor in the parameter and leaves its memory to whoever holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels._vocabulary import is_dtensor

__all__ = [
    "HeadWeight",
    "class_before_sharding",
    "gathered",
    "is_freed",
    "is_lent",
    "is_sharded",
    "is_unit_of_fsdp2",
    "keep_whole",
    "unwrapped",
    "whole_shape",
]

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy

    _FSDP1: tuple[Any, ...] = (FullyShardedDataParallel,)
    _FSDP2: tuple[Any, ...] = (FSDPModule,)
    _FREEING: tuple[Any, ...] = (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)
else:
    _FSDP1 = _FSDP2 = _FREEING = ()


class HeadWeight(Enum):
    """How a head hands out its weight for use after its forward."""

    ALIAS = "as it is"
    ALIAS_OF_UNIT = "as it is, through the node that a sharding unit's hooks wait for"
    COPY = "as a copy"


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside of FSDP1's wrappers around ``module`` itself."""
    while isinstance(module, _FSDP1):
        module = module.module
    return module


def _units(head: nn.Module) -> Iterator[Any]:
    """FSDP1's wrappers and FSDP2's units around the linear layer in ``head``, down through peft's ``modules_to_save``
    and adapters."""
    module: Any = head
    while isinstance(module, nn.Module):
        if isinstance(module, _FSDP1 + _FSDP2):
            yield module
        if isinstance(module, _FSDP1):
            module = module.module
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            saved: Any = module.modules_to_save
            yield from (unit for each in saved.values() for unit in _units(each))
            return
        else:
            module = getattr(module, "base_layer", None)


def keep_whole(head: nn.Module) -> HeadWeight:
    """How ``head``, as its model names it, is to hand out its weight in a forward that begins now.

    A unit of FSDP2's around the head itself is set to keep its parameters from the forward to the backward.
    """
    result = HeadWeight.ALIAS
    for unit in _units(head):
        if isinstance(unit, _FSDP1):
            frees = unit.sharding_strategy in _FREEING
        else:
            frees = torch.compiler.is_compiling() or not _keeps_until_backward(unit)
        if frees:
            return HeadWeight.COPY
        result = HeadWeight.ALIAS_OF_UNIT
    return result


def _keeps_until_backward(unit: Any) -> bool:
    try:
        unit.set_reshard_after_forward(False, recurse=False)
    except AssertionError:  # of a unit that replicates, which has no such setting
        return False
    return True


def is_freed(weight: Tensor) -> bool:
    """Whether a framework has taken the memory of ``weight`` back."""
    return weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


def is_lent(weight: Tensor) -> bool:
    """Whether a module holds ``weight`` for the time of a forward only: under FSDP1, which makes views of a flat
    parameter, and under ZeRO-3."""
    return not isinstance(weight, nn.Parameter) or hasattr(weight, "ds_id")


def is_unit_of_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2 wraps ``module`` itself."""
    return isinstance(module, _FSDP2)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 has a part of ``model``."""
    return any(isinstance(module, _FSDP1 + _FSDP2) for module in model.modules())


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter that ZeRO-3 or FSDP2 may have taken apart. FSDP1's parts tell none."""
    return getattr(parameter, "ds_shape", parameter.shape)


def class_before_sharding(cls: Any) -> Any:
    """What FSDP2 has derived the class of a module from, whose instances can't be made or copied; or ``cls``."""
    return next(each for each in cls.__mro__ if not issubclass(each, _FSDP2))


def gathered(weight: Any) -> Tensor:
    """``weight`` as a whole; of a distributed tensor by communication, in which every rank has to take part."""
    return weight.full_tensor() if is_dtensor(weight) else weight
