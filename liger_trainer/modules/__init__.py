"""The kernels as modules, under the names that Liger-Kernel gave them, for composing models by hand."""

from .add_rms_norm import LigerFusedAddRMSNorm
from .cross_entropy import LigerCrossEntropyLoss
from .divergence import LigerFusedLinearJSD, LigerJSD, LigerKLDIVLoss
from .layer_norm import LigerLayerNorm
from .linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from .mlp import LigerGEGLUMLP, LigerSwiGLUMLP
from .rms_norm import LigerRMSNorm
from .rotary import liger_rotary_pos_emb

__all__ = [
    "LigerCrossEntropyLoss",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerGEGLUMLP",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerLayerNorm",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "liger_rotary_pos_emb",
]
