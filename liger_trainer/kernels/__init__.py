"""Fused kernels for language-model training, each an ordinary differentiable function of tensors.

They know nothing of transformers or TRL and serve any PyTorch loop.
"""

from ._force_torch import force_from_environment, use_torch
from ._vocabulary import VocabularyShard
from .add_rms_norm import add_rms_norm, rms_norm_and_residual
from .cross_entropy import CrossEntropyOutput, cross_entropy
from .divergence import jsd, kl_div
from .gated_activation import geglu, swiglu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .linear_jsd import JSDOutput, linear_jsd
from .linear_log_probs import LOG_PROB_OUTPUTS, LogProbs, linear_log_probs
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "LOG_PROB_OUTPUTS",
    "CrossEntropyOutput",
    "JSDOutput",
    "LogProbs",
    "VocabularyShard",
    "add_rms_norm",
    "cross_entropy",
    "geglu",
    "jsd",
    "kl_div",
    "layer_norm",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_log_probs",
    "rms_norm",
    "rms_norm_and_residual",
    "rotary",
    "swiglu",
    "use_torch",
]

force_from_environment()
