"""Models, data and measurements that the tests of the Hugging Face side share: small enough for seconds on one core."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from wide_tensors import wide_tensors

VOCAB = 211  # a prime that is no other dimension of the model
HIDDEN = 32


TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **config}))


def sequences(count: int = 16, length: int = 13, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random token sequences whose first tokens, and every fifth sequence's last ones, carry no label."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(count):
        input_ids = torch.randint(3, VOCAB, (length,), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        labels = input_ids.clone()
        labels[: 1 + index % 4] = -100
        if index % 5 == 0:
            attention_mask[-4:] = 0
            labels[-4:] = -100
        data.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return data


@dataclass
class LogitsRows:
    """``rows``: the most rows of a tensor with the vocabulary's width that any op met, but for the weight."""

    rows: int = 0


@contextmanager
def logits_rows() -> Iterator[LogitsRows]:
    """Look at every op inside, those within fused ops and in the backward included."""
    seen = LogitsRows()
    with wide_tensors(VOCAB, rows=0, hidden_size=HIDDEN) as found:
        yield seen
    seen.rows = max((math.prod(shape[:-1]) for _, shape in found), default=0)
