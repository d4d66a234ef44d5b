"""Preference, distillation and policy losses: pure functions of log-probabilities, and modules on a model's head.

Each file holds one loss: a function with its formula and its paper, which takes log-probabilities from anywhere, and a
module ``LigerFusedLinear...Loss`` that takes hidden states and the head's weight and never builds the logits. The
modules are called as Liger-Kernel's of these names.
"""

from .cpo import CPO_LOSS_TYPES, LigerFusedLinearCPOLoss, cpo_loss
from .dpo import DPO_LOSS_TYPES, LigerFusedLinearDPOLoss, dpo_loss
from .grpo import GRPO_LOSS_TYPES, GRPOOptions, GRPOOutput, LigerFusedLinearGRPOLoss, grpo_loss
from .jsd import LigerFusedLinearJSDLoss, jsd_loss
from .kto import KTO_LOSS_TYPES, LigerFusedLinearKTOLoss, kto_kl, kto_loss
from .orpo import LigerFusedLinearORPOLoss, orpo_loss
from .simpo import LigerFusedLinearSimPOLoss, simpo_loss

__all__ = [
    "CPO_LOSS_TYPES",
    "DPO_LOSS_TYPES",
    "GRPO_LOSS_TYPES",
    "KTO_LOSS_TYPES",
    "GRPOOptions",
    "GRPOOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "cpo_loss",
    "dpo_loss",
    "grpo_loss",
    "jsd_loss",
    "kto_kl",
    "kto_loss",
    "orpo_loss",
    "simpo_loss",
]
