"""Heads with weights in int8, as far as a CPU without a quantisation library can have them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Int8Activations", "Int8Head"]


class Int8Head(nn.Module):
    """A weight in int8 with a scale a row, dequantised in the forward."""

    def __init__(self, linear: nn.Linear, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("rounded", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = nn.Parameter(torch.randn(linear.out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, self.rounded.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8Activations(Int8Head):
    """The inputs are rounded too: no product with any weight."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 7
        return super().forward((x / scale).round() * scale)
