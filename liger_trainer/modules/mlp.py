"""Gated MLPs as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels import geglu, swiglu

__all__ = ["LigerGEGLUMLP", "LigerSwiGLUMLP"]

_SILU = ("silu", "swish")
_GELU = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none", "gelu_python": "none"}


class _GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``, with biases where the config says ``mlp_bias``."""

    def __init__(self, config: Any, intermediate_size: int | None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)


def _activation_name(config: Any) -> str | None:
    """Gemma's later configs call ``hidden_activation`` what the others call ``hidden_act``."""
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)


class LigerSwiGLUMLP(_GatedMLP):
    """The gated MLP of Llama, Mistral and Qwen: ``down_proj(silu(gate_proj(x)) * up_proj(x))``.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_act`` and perhaps ``mlp_bias``.
        intermediate_size: instead of the config's, as for the shared expert of a mixture.

    Shapes: (..., hidden_size) -> (..., hidden_size).

    Raises:
        ValueError: the config's activation is not SiLU.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        activation = _activation_name(config)
        if activation not in _SILU:
            raise ValueError(f"config.hidden_act must be one of {_SILU}, got {activation!r}")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLP(_GatedMLP):
    """The gated MLP of Gemma: ``down_proj(gelu(gate_proj(x)) * up_proj(x))``.

    The GELU is the one that the config names: the tanh approximation (``gelu_pytorch_tanh``, ``gelu_new``; also where
    it names none) or the exact one (``gelu``).

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_activation`` or ``hidden_act``, and
            perhaps ``mlp_bias``.
        intermediate_size: instead of the config's.

    Shapes: (..., hidden_size) -> (..., hidden_size).

    Raises:
        ValueError: the config's activation is not a GELU.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        activation = _activation_name(config) or "gelu_pytorch_tanh"
        if activation not in _GELU:
            raise ValueError(f"config.hidden_activation must be one of {tuple(_GELU)}, got {activation!r}")
        self.approximate = _GELU[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), self.approximate))
