"""A share of the matrix of trainers and features, and of what it is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from beside_trl import slow
from feature_matrix import BEGIN, END, FEATURES, PAGE, TRAINERS, Result, run, table

from liger_trainer.patching import adapters

CELLS = [(trainer, feature) for feature in FEATURES for trainer in TRAINERS if trainer in FEATURES[feature].only]
# One of every feature that nothing else in the default run has; the rest is slow.
OFTEN = [
    ("DPO", "dora-head"),
    ("DPO", "gemma2"),
    ("DPO", "saved-head"),
    ("ORPO", "moe"),
    ("KTO", "tokens"),
    ("ORPO", "prompt-tuning"),
    ("Distillation", "lora-head"),
    ("SFT", "metrics-argmax"),
    ("RLOO", "least-memory"),
]


@pytest.mark.parametrize(
    ("trainer", "feature"), [cell if cell in OFTEN else pytest.param(*cell, marks=slow) for cell in CELLS]
)
def test_cell(trainer, feature):
    result = run(trainer, feature)
    assert result.outcome in ("same", "same, logits", "refused"), result.words


def test_an_adapter_left_out_is_seen(monkeypatch):
    monkeypatch.setattr(adapters, "adapters_in_force", lambda head: [])
    result = run("ORPO", "lora-head")
    assert result.outcome == "different"


def test_the_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [feature.words for feature in FEATURES.values()]
    assert rows[0].split(" | ")[1:] == [*list(TRAINERS)[:-1], f"{list(TRAINERS)[-1]} |"]
    assert "✗" not in text.replace("✗:", "")


def test_table_says_what_differs():
    results = [Result(trainer, feature, "same") for feature in FEATURES for trainer in TRAINERS]
    results[3] = replace(results[3], outcome="different", words="loss is 2, not 1")
    results[4] = replace(results[4], outcome="refused", words="ValueError: no")
    lines = table(results).splitlines()
    assert "| nothing further | ✓ | ✓ | ✓ | ✗ [1] | [2] | ✓ |" in next(line for line in lines if "nothing" in line)
    assert "1. different: loss is 2, not 1" in lines and "2. refused: ValueError: no" in lines
