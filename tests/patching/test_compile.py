"""A patched Llama under torch.compile: one graph, for any number of tokens, with the eager model's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import liger_trainer

V = 97  # the tiny models' vocabulary


def batch(tokens, padded=False):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, V, (2, tokens), generator=generator)
    labels = ids.clone()
    labels[0, : tokens // 2] = -100
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize(
    ("padded", "options"),
    [(True, {}), (False, {"cross_entropy": True, "fused_linear_cross_entropy": False})],
    ids=["fused_head-padded", "loss_on_logits-whole"],
)
def test_a_patched_llama_is_one_graph_for_any_number_of_tokens(tiny, gradients, error, padded, options):
    torch._dynamo.reset()
    stock = tiny("Llama")
    patched = copy.deepcopy(stock)
    report = liger_trainer.apply_liger_kernel(patched, **options)
    assert {"rms_norm", "mlp", "rope"} < {each.kind for each in report.replaced}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(patched), fullgraph=True, backend=counter)
    frames = []
    for tokens in (11, 14, 23):
        inputs = batch(tokens, padded)
        for tensor in inputs.values():
            torch._dynamo.mark_dynamic(tensor, 1)  # raises where the graph holds for this number alone
        ours = {name.removeprefix("_orig_mod."): each for name, each in gradients(compiled, inputs).items()}
        assert error(ours, gradients(patched, batch(tokens, padded))) < 1e-6
        assert error(ours, gradients(stock, batch(tokens, padded))) < 1e-5
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1]
