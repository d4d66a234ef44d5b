"""Sizes of the Llamas that the many-GPU benchmark trains and the memory calculation counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .shapes import SHAPES as MODELS

__all__ = ["SHAPES", "LlamaShape"]


@dataclass(frozen=True)
class LlamaShape:
    """Fields of ``transformers.LlamaConfig``; numbers of parameters follow from them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def attention_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden_size * (2 * self.attention_size + 2 * self.key_value_size)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def root_parameters(self) -> int:
        """What belongs to no layer: embedding, head where it is not the embedding, final norm."""
        return self.head_parameters * (1 if self.tie_word_embeddings else 2) + self.hidden_size

    @property
    def parameters(self) -> int:
        return self.num_hidden_layers * self.layer_parameters + self.root_parameters

    def config(self, **options: Any) -> Any:
        import transformers

        return transformers.LlamaConfig(**asdict(self), **options)


def _of(name: str) -> LlamaShape:
    _, fields = MODELS[name]
    return LlamaShape(**fields)


SHAPES: dict[str, LlamaShape] = {
    "tiny": LlamaShape(64, 128, 2, 4, 2, 16, 512, False),
    "llama-3.2-1b": _of("llama-3.2-1b"),
    "llama-3-8b": _of("llama-3-8b"),
    "llama-3-70b": LlamaShape(8192, 28672, 80, 64, 8, 128, 128256, False),
}
