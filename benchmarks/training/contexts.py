"""Which lengths to try, so that both a curve over the context and the largest context come out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["OUT_OF_MEMORY", "fits", "largest", "next_length"]

OUT_OF_MEMORY = "out of memory"
FULL = 0.97  # of a device: the rest is its driver's, and gaps


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[int, bool] | None:
    """Whether each length that was tried fits into memory; None where a row failed for another reason."""
    found = {}
    for row in rows:
        if row["error"] not in (None, OUT_OF_MEMORY):
            return None
        found[row["shape"]["length"]] = row["error"] is None
    return found


def next_length(
    tried: Mapping[int, bool],
    start: int,
    multiple: int,
    precision: float,
    longest: int,
    peaks: Mapping[int, float] | None = None,
    capacity: float | None = None,
) -> int | None:
    """The length to try next, or None when the largest one that fits is known.

    Doubles from ``start`` until something doesn't fit (or halves, where ``start`` doesn't), then bisects. Once two
    lengths say what a token takes, the next guess is instead where that fills the device, and then what is just beyond.

    Args:
        tried: whether a length fits.
        start: the first length.
        multiple: lengths are multiples of it; ``start`` is one.
        precision: the search ends when the shortest length that doesn't fit is no longer than ``1 + precision`` times
            the longest that does.
        longest: none beyond it is tried.
        peaks: bytes that lengths took which did fit.
        capacity: bytes of the device; without it nothing is guessed.
    """
    good = max((length for length, does in tried.items() if does), default=0)
    bad = min((length for length, does in tried.items() if not does), default=None)
    if bad is None:
        following = min(2 * good or start, longest)
    elif bad - good <= max(multiple, precision * good):
        return None
    else:
        following = (good + bad) // 2 // multiple * multiple
    if not good < following < (bad or longest + 1):
        return None
    known = sorted((peaks or {}).items())[-2:]
    if capacity is None or len(known) < 2 or known[1][1] <= known[0][1]:
        return following
    (shorter, less), (longer, more) = known
    full = longer + (FULL * capacity - more) * (longer - shorter) / (more - less)
    guess = int(full) // multiple * multiple
    if guess <= good:  # as good as full already
        guess = max(good + multiple, int(good * (1 + precision)) // multiple * multiple)
    guess = min(guess, longest)
    return guess if good < guess < (bad or longest + 1) else following


def largest(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int | None]:
    """The longest length that fitted (0: none did), and the shortest that didn't (None: not reached)."""
    good = [row["shape"]["length"] for row in rows if row["error"] is None]
    bad = [row["shape"]["length"] for row in rows if row["error"] == OUT_OF_MEMORY]
    return max(good, default=0), min(bad, default=None)
