"""The comparison of two runs from the same seed in fp32."""

from __future__ import annotations

import pytest

Curves = dict[str, list[float]]


def assert_same_curves(ours: Curves, stock: Curves, names: tuple[str, ...], steps: int) -> None:
    """Every step of every curve agrees to rounding, and the curves are those of a training."""
    assert ours.keys() == stock.keys() == set(names)
    for name in names:
        assert len(ours[name]) == len(stock[name]) == steps
        assert ours[name] == pytest.approx(stock[name], rel=2e-5, abs=2e-5), name
        assert max(stock[name]) - min(stock[name]) > 1e-2, f"{name} stays where it is: no training to compare"
