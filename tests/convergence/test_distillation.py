"""Distillation: the loss of TRL's GKD, step for step.

The long form: python benchmarks/training/convergence.py --tasks distillation
"""

from __future__ import annotations

from beside import assert_same_curves


def test_same_curve(train):
    stock, ours = (train("distillation", provider) for provider in ("hf", "ours"))
    assert_same_curves(ours, stock, ("loss",), steps=8)
