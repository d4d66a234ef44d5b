"""The models that are trained: layer sizes of real ones, random weights."""

from __future__ import annotations

from typing import Any

__all__ = ["FAMILIES", "SHAPES", "config_of", "shrunk"]

# Fields of the config, after its model type.
Shape = tuple[str, dict[str, Any]]

SHAPES: dict[str, Shape] = {
    "llama-3.2-1b": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    }),
    "llama-3-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    }),
    "qwen3-0.6b": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
}  # fmt: skip

# One model of about a billion parameters a family, and what it is called. Layers are those of the real model, fewer
# where it is much larger, so that a step of the untouched model fits into 80 GB.
FAMILIES: dict[str, tuple[str, Shape]] = {
    "llama": ("Llama-3.2-1B", SHAPES["llama-3.2-1b"]),
    "qwen3": ("Qwen3-1.7B, 16 of 28 layers", ("qwen3", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    })),
    "gemma3": ("gemma-3-1b", ("gemma3_text", {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
        "tie_word_embeddings": True,
    })),
    "phi3": ("Phi-3-mini-4k, 8 of 32 layers", ("phi3", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
    })),
    "mistral": ("Mistral-7B-v0.3, 4 of 32 layers", ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None, "tie_word_embeddings": False,
    })),
    "olmo2": ("OLMo-2-0425-1B", ("olmo2", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 100352, "tie_word_embeddings": False,
    })),
    "granite": ("granite-3.1-2b, 20 of 40 layers", ("granite", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    })),
    "qwen3-moe": ("Qwen3-30B-A3B, 3 of 48 layers, 64 of 128 experts", ("qwen3_moe", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 3,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    })),
}  # fmt: skip

# What makes any of them small enough for a CPU.
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def shrunk(shape: Shape) -> Shape:
    """The shape with a few small layers and 512 tokens."""
    model_type, fields = shape
    return model_type, fields | {name: value for name, value in TINY.items() if name in fields}


def config_of(shape: Shape) -> Any:
    """The config of transformers; positions are bounded by memory alone."""
    import transformers

    model_type, fields = shape
    # The default padding token of some families lies outside of a small vocabulary.
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.CONFIG_MAPPING[model_type](**fields, **tokens, max_position_embeddings=2**22, use_cache=False)
