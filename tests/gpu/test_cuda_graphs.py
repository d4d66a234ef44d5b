"""CUDA graphs over every op: captured by hand, and by torch.compile(mode="reduce-overhead")."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from liger_trainer.kernels import linear_cross_entropy, linear_jsd, linear_log_probs

from ..kernels.cases import CASES, Call, Sizes, bits, ids, run

# Tagged as unsafe to capture, since the host may wait for the number of labels: the compiler leaves them out of graphs.
TAGGED = (linear_cross_entropy, linear_jsd, linear_log_probs)
SIZES = Sizes(tokens=37, width=64, classes=1031, tile_rows=16)


def changed(tensor: Tensor | None) -> Tensor | None:
    """Other values of the same kind: the rows in another order, so that as many labels count as before."""
    if tensor is None or not tensor.dim():
        return tensor
    return tensor.detach().roll(1, 0).mul(-1 if tensor.requires_grad else 1).requires_grad_(tensor.requires_grad)


def others(call: Call, tensors: dict[str, Tensor | None]) -> Call:
    return replace(call, tensors={name: changed(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.asks_device], ids=ids)
def test_forward_and_backward_are_captured_and_replayed(case, dtype):
    call = case.make("cuda", dtype, SIZES)
    upstream = call.upstream(call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(call, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, upstream)
    other = call
    for _ in range(3):
        other = others(call, other.tensors)
        expected = run(other, upstream)
        with torch.no_grad():
            for name, tensor in call.tensors.items():
                if tensor is not None:
                    tensor.copy_(other.tensors[name])
        graph.replay()
        for name, tensor in expected.items():
            assert torch.equal(bits(captured[name]), bits(tensor)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_reduce_overhead(case, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(self):
        nonlocal replays
        replays += 1
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    call = case.make("cuda", torch.float32, SIZES)
    compiled = replace(call, function=torch.compile(call.function, mode="reduce-overhead", fullgraph=True))
    upstream = call.upstream(call())
    # Once to compile, once to warm up, once to record, then replayed.
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        compiled = others(compiled, compiled.tensors)
        ours = {name: tensor.clone() for name, tensor in run(compiled, upstream).items()}
        expected = run(replace(call, tensors=compiled.tensors), upstream)
        for name, tensor in expected.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
            else:
                assert torch.equal(ours[name], tensor), name
    if case.op not in TAGGED:
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert replays >= 4  # forward and backward, twice at the least
    torch._dynamo.reset()
