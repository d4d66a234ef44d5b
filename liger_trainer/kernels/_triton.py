"""Triton where it can run, and stand-ins that let the kernel files import where it cannot.

Every kernel file does ``from ._triton import tl, triton``. Without a usable Triton (macOS, Windows, a GPU machine
without a C compiler) the ``@triton.jit`` functions stay plain, never called Python functions, and the dispatcher
serves the torch implementations instead; see :mod:`liger_trainer.kernels._library`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["HAS_TRITON", "INTERPRETED", "WHY_NOT", "tl", "triton"]


def _why_not() -> str | None:
    """The reason for which Triton kernels cannot be launched here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not importable ({error})"
    # Triton builds its launcher with the host's compiler at the first launch: find that out before it does.
    if torch.cuda.is_available() and not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "triton needs a C compiler and neither $CC, gcc, clang nor cc was found"
    return None


WHY_NOT: str | None = _why_not()
HAS_TRITON: bool = WHY_NOT is None

triton: Any
tl: Any
if HAS_TRITON:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    INTERPRETED = bool(triton.knobs.runtime.interpret)
else:
    warnings.warn(
        f"liger_trainer runs without its Triton kernels: {WHY_NOT}. The torch implementations serve instead; results "
        "are the same, speed is not.",
        RuntimeWarning,
        stacklevel=2,
    )

    def _plain(fn: Any = None, **_: Any) -> Any:
        return fn if fn is not None else _plain

    triton = SimpleNamespace(jit=_plain)
    tl = SimpleNamespace(constexpr=int)
    INTERPRETED = False
