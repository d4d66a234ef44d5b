"""Same inputs, same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from .cases import CASES, RAGGED, Sizes, bits, ids, run, strided
from .helpers import ON_GPU, dtypes_of

SIZES = {"ragged": RAGGED}
if ON_GPU:
    SIZES |= {
        "one_token": Sizes(tokens=1, width=4, classes=3),
        "large": Sizes(tokens=2048, width=4096, classes=32000, tile_rows=1024),
        "large_ragged": Sizes(tokens=1237, width=1100, classes=10007, tile_rows=333),
    }


@contextmanager
def memory_of_nan() -> Iterator[None]:
    """Fill memory that is allocated inside, and would hold whatever was there before, with NaN or large integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided], ids=["dense", "strided"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_same_inputs_same_bits(implementation, device, case, sizes, layout):
    for dtype in dtypes_of(device):
        first = run(case.make(device, dtype, SIZES[sizes], layout))
        with memory_of_nan():
            again = run(case.make(device, dtype, SIZES[sizes], layout))
        for name, expected in first.items():
            assert torch.equal(bits(again[name]), bits(expected)), name
            assert expected.isfinite().all(), name
