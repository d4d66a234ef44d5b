"""``LIGER_TRAINER_DISABLE``, the switch outside of the code."""

from __future__ import annotations

import os

__all__ = ["DISABLE_VARIABLE", "disabled"]

DISABLE_VARIABLE = "LIGER_TRAINER_DISABLE"
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def disabled() -> bool:
    """Whether the environment switches liger_trainer off: ``LIGER_TRAINER_DISABLE`` is 1, true, yes or on.

    Raises:
        ValueError: the variable is set to something that is neither a yes nor a no.
    """
    value = os.environ.get(DISABLE_VARIABLE, "").strip().lower()
    if value in _TRUE:
        return True
    if not value or value in _FALSE:
        return False
    raise ValueError(f"{DISABLE_VARIABLE}={value!r}: expected one of {', '.join(_TRUE)}, or {', '.join(_FALSE)}")
