"""Patched models whose LM head is tensor-parallel: torch's parallelize_module and transformers' tp_plan."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llama

from . import models_on_rank

LAYOUTS = ["replicated", "sequence-parallel input", "divided output"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_parallelize_module(ranks, when, layouts):
    ranks.run(models_on_rank.torch_style, when, layouts)


def test_a_hook_that_wants_the_logits_of_its_rank(ranks):
    ranks.run(models_on_rank.local_output)


def test_log_probabilities_and_logits_that_are_cut_off(ranks):
    ranks.run(models_on_rank.log_probs_of_rows)


def test_transformers_plan(ranks, tmp_path):
    size = 12 * ranks.size
    model = tiny_llama(
        tie_word_embeddings=False,
        hidden_size=size,
        intermediate_size=size,
        num_attention_heads=2 * ranks.size,
        num_key_value_heads=ranks.size,
    )
    model.save_pretrained(tmp_path)
    counts = ranks.run(models_on_rank.transformers_plan, str(tmp_path))
    assert all(found == counts[0] for found in counts)
    assert counts[0]["fused_linear_cross_entropy"] == 1
