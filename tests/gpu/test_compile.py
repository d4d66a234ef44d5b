"""Inductor's code around the ops, and around a patched Llama."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, tiny_llama
from torch._dynamo.testing import CompileCounterWithBackend

import liger_trainer

from ..kernels.cases import CASES, Sizes, ids, run

ONE_AN_OP = list({case.op: case for case in reversed(CASES)}.values())


@pytest.mark.parametrize("case", ONE_AN_OP, ids=ids)
def test_inductor_compiles_each_op_once_for_any_number_of_tokens(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    frames = []
    for tokens in (5, 9, 19):  # sizes that no other dimension has: Dynamo takes equal ones for the same
        call = case.make("cuda", torch.float32, Sizes(tokens, width=24, classes=131))
        if not frames:
            graph = torch.compile(call.function, backend=counter, fullgraph=True, dynamic=True)
        ours, eager = run(replace(call, function=graph)), run(call)
        for name, expected in eager.items():
            torch.testing.assert_close(ours[name], expected)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


def test_inductor_compiles_a_patched_llama_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    stock = tiny_llama().train().cuda()
    patched = copy.deepcopy(stock)
    liger_trainer.apply_liger_kernel(patched)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(copy.deepcopy(patched), fullgraph=True, backend=counter)
    frames = []
    for tokens in (11, 14, 23):
        ids = torch.randint(3, VOCAB, (2, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(tokens))
        labels = ids.clone()
        labels[0, : tokens // 2] = -100

        def loss_and_gradients(model, ids=ids, labels=labels):
            model.zero_grad()
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

        expected = loss_and_gradients(stock), loss_and_gradients(patched)
        for tensor in (ids, labels):
            torch._dynamo.mark_dynamic(tensor, 1)
        ours = loss_and_gradients(compiled)
        for reference in expected:
            for tensor, exact in zip(ours, reference, strict=True):
                assert (tensor - exact).norm() <= 1e-4 * exact.norm()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1]
