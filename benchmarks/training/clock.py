"""The time that one call of a script has, where what it measures takes several calls."""

from __future__ import annotations

import time
from typing import Any

from .isolated import Isolated, IsolatedError

__all__ = ["Clock", "OutOfTimeError"]

FEWEST_SECONDS = 40  # left for a measurement, or it is not begun


class OutOfTimeError(Exception):
    """The minutes of this call are over."""


class Clock:
    """The time that this call has left, and the most that one answer may take."""

    def __init__(self, minutes: float | None, timeout: float) -> None:
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.timeout = timeout

    def left(self) -> float:
        return self.end - time.monotonic()

    def check(self) -> None:
        """Raise `OutOfTimeError` where nothing should be begun any more."""
        if self.left() < FEWEST_SECONDS:
            raise OutOfTimeError

    def ask(self, process: Isolated, request: dict[str, Any]) -> dict[str, Any]:
        """The process's answer.

        Raises:
            IsolatedError: there is none.
            OutOfTimeError: there is none because the call's time is over, which is not the process's fault.
        """
        left = self.left()
        try:
            return process.ask(request, min(self.timeout, left))
        except IsolatedError:
            if left < self.timeout and self.left() <= 0:
                raise OutOfTimeError from None
            raise
