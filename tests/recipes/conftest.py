"""The tiny chat model, made once for all recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_chat import make_tokenizer, save_tiny_llama
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama", tokenizer)
