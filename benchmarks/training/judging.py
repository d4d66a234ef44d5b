"""Whether a run of another implementation could have been one of the reference's own.

Runs of one implementation that differ in their seed alone form a band. A run of another one, from the seed of the
first of them, passes by two rules, both over curves smoothed by a running mean:

1. at every step it lies within the band, or outside by no more than a tenth of the band's median width (the twin that
   it follows is often the band's edge, and rounding takes it to either side);
2. on average it stays as near to its twin as a quarter of the band's mean width.

The first is what a reader of the plot sees, the second is the sharper one: a band is wide, and a wrong run can stay in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

__all__ = ["MOST_DRIFT", "MOST_EXCESS", "Verdict", "judge", "smoothed"]

MOST_EXCESS, MOST_DRIFT = 0.1, 0.25


@dataclass(frozen=True)
class Verdict:
    """How a run stands to the band.

    Attributes:
        excess: the largest distance outside of the band, over the band's median width.
        drift: the mean distance from the twin, over the band's mean width.
        at: the step, from 0, of the largest excess.
    """

    excess: float
    drift: float
    at: int

    @property
    def passed(self) -> bool:
        return (
            self.excess <= MOST_EXCESS and self.drift <= MOST_DRIFT
        )  # a NaN in the run makes its drift NaN, which fails


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over the last ``window`` values, from the first full window on."""
    if not 1 <= window <= len(values):
        raise ValueError(f"window must be between 1 and the {len(values)} values, got {window}")
    return [mean(values[end - window : end]) for end in range(window, len(values) + 1)]


def judge(candidate: Sequence[float], reference: Sequence[Sequence[float]], window: int) -> Verdict:
    """Hold a run against the runs of the reference.

    Args:
        candidate: one number a step.
        reference: the same for each seed, the first being the candidate's. Two at the least.
        window: steps that are smoothed over.

    Raises:
        ValueError: fewer than two runs, runs of unequal length, or a window longer than they are.
    """
    if len(reference) < 2:
        raise ValueError(f"a band takes at least two runs of the reference, got {len(reference)}")
    lengths = {len(candidate), *map(len, reference)}
    if len(lengths) > 1:
        raise ValueError(f"the runs must have the same number of steps, got {sorted(lengths)}")
    mine = smoothed(candidate, window)
    theirs = [smoothed(each, window) for each in reference]
    low, high = ([edge(values) for values in zip(*theirs)] for edge in (min, max))
    widths = [b - a for a, b in zip(low, high)]
    outside = [a - x if x < a else x - b if x > b else 0.0 for x, a, b in zip(mine, low, high)]
    at = max(range(len(outside)), key=outside.__getitem__)
    drift = mean(abs(x - twin) for x, twin in zip(mine, theirs[0]))
    return Verdict(outside[at] / median(widths), drift / mean(widths), at + window - 1)
