"""Same inputs, same bits, at sizes that fill the GPU and beside other work."""

from __future__ import annotations

import pytest
import torch

from liger_trainer.kernels import linear_cross_entropy, linear_jsd, linear_log_probs

from ..kernels.cases import CASES, Sizes, bits, ids, run

SIZES = {
    "even": Sizes(tokens=512, width=2048, classes=8192, tile_rows=128),
    "ragged": Sizes(tokens=333, width=1100, classes=5003, tile_rows=100),
    "wide": Sizes(tokens=9, width=33000, classes=49153, tile_rows=5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_same_bits_beside_work_on_another_stream(case, sizes, dtype):
    if sizes == "wide" and case.op in (linear_cross_entropy, linear_jsd, linear_log_probs):
        pytest.skip("a weight alone would take 6 GB")
    call = case.make("cuda", dtype, SIZES[sizes])
    upstream = call.upstream(call())
    first = {name: bits(tensor) for name, tensor in run(call, upstream).items()}
    noise = torch.randn(2048, 2048, device="cuda")
    index = torch.randint(2048, (2048,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    differ = {name: torch.zeros((), dtype=torch.bool, device="cuda") for name in first}
    for repetition in range(12):
        with torch.cuda.stream(side):
            for _ in range(1 + repetition % 4):  # products, and sums by atomics
                torch.zeros_like(noise).index_add_(0, index, noise @ noise)
        for name, tensor in run(call, upstream).items():
            differ[name] |= (bits(tensor) != first[name]).any()
    torch.cuda.synchronize()
    assert not [name for name, different in differ.items() if different]
