"""The library's logger: seen at INFO without any set-up, quiet as soon as the application says so."""

from __future__ import annotations

import logging
import sys

__all__ = ["logger"]


class _FallbackHandler(logging.StreamHandler):
    """Writes to stderr as long as the application has not set logging up itself.

    Records always propagate, so an application with handlers of its own gets each of them once, in its own format.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        self.setStream(sys.stderr)  # looked up late: notebooks and tests replace it
        super().emit(record)


def _library_logger() -> logging.Logger:
    library = logging.getLogger("liger_trainer")
    if library.level == logging.NOTSET:
        library.setLevel(logging.INFO)
    if not any(isinstance(handler, _FallbackHandler) for handler in library.handlers):
        library.addHandler(_FallbackHandler())
    return library


logger: logging.Logger = _library_logger()
"""``logging.getLogger("liger_trainer")``; silence it with ``logger.setLevel(logging.WARNING)``."""
