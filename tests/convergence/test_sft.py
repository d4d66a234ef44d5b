"""Fine-tuning: the stock trainer's loss curve, step for step, and not that of a run with a fault.

The long form: python benchmarks/training/convergence.py --tasks sft
"""

from __future__ import annotations

from beside import assert_same_curves


def test_same_curve(train):
    stock, ours = (train("sft", provider) for provider in ("hf", "ours"))
    assert_same_curves(ours, stock, ("loss",), steps=8)
