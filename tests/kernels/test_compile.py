"""Every op under torch.compile, and what must not depend on the number of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from liger_trainer.kernels import geglu, layer_norm, linear_cross_entropy, rms_norm, rotary, swiglu
from liger_trainer.kernels._triton import triton

from .cases import CASES, Sizes, bits, ids, run
from .helpers import ON_GPU

# What the compiler sees alike: other labels, a factor more inside the op.
ALIKE = ("all_ignored", "none_ignored", "token_scaling", "sum-softcap", "interleaved-per_pair")


@pytest.mark.parametrize("case", [case for case in CASES if case.label not in ALIKE], ids=ids)
def test_each_op_is_one_graph_for_any_number_of_tokens(device, case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    frames = []
    for tokens in (5, 9, 19):  # sizes that no other dimension has: Dynamo takes equal ones for the same
        call = case.make(device, torch.float32, Sizes(tokens, width=24, classes=131))
        if not frames:
            graph = torch.compile(call.function, backend=counter, fullgraph=True, dynamic=True)
        ours, eager = run(replace(call, function=graph)), run(call)
        for name, expected in eager.items():
            assert torch.equal(bits(ours[name]), bits(expected)), name
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


@pytest.mark.parametrize("number", [int, float])
def test_a_new_number_of_items_needs_no_new_graph(device, number):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda hidden, weight, labels, items: linear_cross_entropy(hidden, weight, labels, num_items=items),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    weight = torch.randn(23, 8, device=device, requires_grad=True)
    frames = []
    for n in (10, 13, 16):
        hidden = torch.randn(n, 8, device=device, requires_grad=True)
        arguments = hidden, weight, torch.randint(23, (n,), device=device), number(n + 1)
        losses = compiled(*arguments), linear_cross_entropy(*arguments[:3], num_items=arguments[3])
        torch.testing.assert_close(*losses)
        for ours, eager in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
            torch.testing.assert_close(ours, eager)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def block(x, weight, bias, cos, sin):
    """Every op once: contiguous rows, transposed heads, halves of a fused projection."""
    x = layer_norm(rms_norm(x, weight, offset=1.0, casting="gemma"), weight, bias)
    heads = rms_norm(x.unflatten(-1, (-1, 16)).transpose(1, 2), weight[:16])
    q, k = rotary(heads, heads[:, :1], cos, sin)
    gate, up = x.chunk(2, dim=-1)
    return swiglu(gate, up).sum() + geglu(gate, up).square().sum() + (q * k).sum()


def inputs(tokens, device, dtype=torch.float32):
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 32, device=device, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(32, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return x, weight, bias, *(torch.randn(1, tokens, 16, device=device, dtype=dtype) for _ in range(2))


def test_whole_graph_with_any_number_of_tokens_under_autocast(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for tokens in (5, 7, 16):
        tensors = inputs(tokens, device)
        with torch.autocast(device.type, torch.bfloat16):
            losses = compiled(*tensors), block(*tensors)
        frames.append(counter.frame_count)
        torch.testing.assert_close(*losses)
        for ours, eager in zip(*(torch.autograd.grad(loss, tensors[:3]) for loss in losses), strict=True):
            torch.testing.assert_close(ours, eager)
    assert frames[0] == frames[-1]


def test_what_waits_for_the_device_is_tagged_as_no_part_of_a_cuda_graph():
    """Without a bound of the labels that count, the head's op asks the device for their number."""
    ops = torch.ops.liger_trainer
    for op in (ops.linear_cross_entropy_forward.default, ops.linear_cross_entropy_rows_backward.default):
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_frozen_weights_and_no_grad(device):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, weight, bias, cos, sin = inputs(5, device)
    frozen = x, weight.detach(), bias.detach(), cos, sin
    torch.testing.assert_close(torch.autograd.grad(compiled(*frozen), x), torch.autograd.grad(block(*frozen), x))
    with torch.no_grad():
        assert not compiled(*frozen).requires_grad
        torch.testing.assert_close(compiled(*frozen), block(*frozen))


def test_checkpointing_recomputes_the_same(implementation, device):
    tensors = inputs(5, device)
    plain = torch.autograd.grad(block(*tensors), tensors[:3])
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=False), tensors[:3])
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="kernels are compiled for a GPU only")
def test_triton_compiles_once_for_any_number_of_tokens(device, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        block(*inputs(6, device, dtype)).backward()
        compiled = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda compiled=compiled, **event: compiled.append(event)
        )
        for tokens in (1, 2, 16, 17, 33, 64):
            block(*inputs(tokens, device, dtype)).backward()
        monkeypatch.undo()
        assert not compiled, [event.get("repr") for event in compiled]
