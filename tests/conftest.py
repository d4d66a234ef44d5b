"""Where the tests run: on the GPU if there is one, else on the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before the package is

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models

from liger_trainer.kernels._library import interpreted_kernels
from liger_trainer.kernels._triton import HAS_TRITON, INTERPRETED


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of an op: torch's on the CPU, Triton's on the GPU or, without one, interpreted."""
    if request.param == "torch":
        yield "torch"
    elif not HAS_TRITON:
        pytest.skip("no usable Triton")
    elif torch.cuda.is_available():
        yield "triton"
    elif INTERPRETED:
        with interpreted_kernels():
            yield "triton"
    else:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU if there is one, but for the torch implementation the CPU, where the dispatcher chooses it."""
    if "implementation" in request.fixturenames and request.getfixturevalue("implementation") == "torch":
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
