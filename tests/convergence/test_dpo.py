"""DPO: TRL's loss and reward margins, step for step.

The long form: python benchmarks/training/convergence.py --tasks dpo
"""

from __future__ import annotations

from beside import assert_same_curves


def test_same_curves(train):
    stock, ours = (train("dpo", provider) for provider in ("hf", "ours"))
    assert_same_curves(ours, stock, ("loss", "rewards/margins"), steps=8)
