"""Fused kernels for language-model training, each an ordinary differentiable function of tensors.

They know nothing of transformers or TRL and serve any PyTorch loop.
"""

from .cross_entropy import CrossEntropyOutput, cross_entropy
from .gated_activation import geglu, swiglu
from .layer_norm import layer_norm
from .linear_cross_entropy import DEFAULT_TILE_BYTES, linear_cross_entropy
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "DEFAULT_TILE_BYTES",
    "CrossEntropyOutput",
    "cross_entropy",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "swiglu",
]
