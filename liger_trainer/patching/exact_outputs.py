"""Losses and log-probabilities in fp32 out of a model whose wrapper casts what it returns.

Under FSDP2's ``MixedPrecisionPolicy(output_dtype=torch.bfloat16)``, which accelerate asks for under bf16, a hook after
the forward of each unit casts every floating tensor that it finds in the outputs. Logits may be rounded so; a sum over
a thousand log-probabilities may not. So two hooks stand around that one: the first makes numbers out of the bytes of
each fp32 tensor, 0 to 255, which all dtypes of eight significant bits hold, and the second puts them together again.
Gradients go back in the same way. Both ways are exact for whatever fp32 can hold, infinities, NaN and subnormal numbers
included, where a sum of bf16 tensors overflows or loses what is small. Between the two no NaN can be seen that is none:
anomaly detection and hooks of others see small integers.

No policy is read, which FSDP2 shows nobody: an empty tensor beside the first bytes tells what has become of its dtype,
and where no cast has narrowed it both hooks are taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .sharding import is_unit_of_fsdp2

__all__ = ["from_bytes", "keep_exact", "to_bytes"]

# What losses and metrics are made of, in outputs that have names; the last four are FusedCausalLMOutput's of TRL.
_NAMES = ("loss", "aux_loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits")


def _bytes_of(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).view(torch.uint8).to(torch.bfloat16)


def _value_of(numbers: Tensor) -> Tensor:
    values = torch.empty(numbers.shape[:-1], dtype=torch.float32, device=numbers.device)
    values.unsqueeze(-1).view(torch.uint8).copy_(numbers)
    return values


class _ToBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _bytes_of(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _value_of(gradient)


class _FromBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        return _value_of(numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _bytes_of(gradient)


def to_bytes(values: Tensor) -> Tensor:
    """(\\*, 4) bf16 integers from 0 to 255, the bytes of (\\*) fp32 values.

    The gradient that arrives has to be the bytes of one, as :func:`from_bytes` makes it: no other function may use the
    result, since bytes of two gradients have no sum.
    """
    return _ToBytes.apply(values)


def from_bytes(numbers: Tensor) -> Tensor:
    """(\\*) fp32 values whose bytes are (\\*, 4) integers, in any floating dtype with eight significant bits."""
    return _FromBytes.apply(numbers)


class _Packed(NamedTuple):  # which FSDP2 traverses, and rebuilds with its type
    numbers: Tensor
    witness: Tensor  # no element, fp32 before the cast


def _packed(value: Any) -> Any:
    # Of three dimensions are logits and hidden states, which are the policy's matter.
    if type(value) is Tensor and value.dtype == torch.float32 and value.dim() <= 2:
        return _Packed(to_bytes(value), value.new_empty(0))
    return value


def _replaced(outputs: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(outputs, dict):
        for name in _NAMES:
            if outputs.get(name) is not None:
                outputs[name] = function(outputs[name])
        return outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(function(each) for each in outputs)
    return function(outputs)


class _Hooks:
    """Those of one module, which FSDP2 has already."""

    def __init__(self, module: nn.Module) -> None:
        self._handles = [
            module.register_forward_hook(self._pack, prepend=True),
            module.register_forward_hook(self._unpack),
        ]

    def _pack(self, module: nn.Module, arguments: Any, outputs: Any) -> Any:
        return _replaced(outputs, _packed)

    def _unpack(self, module: nn.Module, arguments: Any, outputs: Any) -> Any:
        return _replaced(outputs, self._unpacked)

    def _unpacked(self, value: Any) -> Any:
        if not isinstance(value, _Packed):
            return value
        limits = torch.finfo(value.witness.dtype)
        if limits.eps > 2**-7:
            raise TypeError(
                f"losses can't be returned in {value.witness.dtype}: output_dtype of the mixed precision policy must "
                "have eight significant bits or more, as torch.bfloat16 has."
            )
        if limits.bits >= 32:
            for each in self._handles:
                each.remove()
        return from_bytes(value.numbers)


_HOOKED: WeakSet[nn.Module] = WeakSet()


def keep_exact(model: nn.Module) -> None:
    """Have ``model`` return its losses and log-probabilities in fp32, whatever FSDP2 casts its outputs to.

    These are the fp32 tensors of up to two dimensions that it returns alone, in a tuple or list, or under the names
    ``loss``, ``aux_loss``, ``log_probs``, ``entropy``, ``log_sum_sq_probs`` and ``mean_logits``. Logits and hidden
    states stay as the policy makes them. Nothing changes where ``model`` is no unit of FSDP2's (yet), or casts nothing.

    Args:
        model: the root unit, with its hooks.

    Raises:
        TypeError: in the forward, where the policy's ``output_dtype`` has less than eight significant bits.
    """
    if is_unit_of_fsdp2(model) and model not in _HOOKED:
        _HOOKED.add(model)
        _Hooks(model)
