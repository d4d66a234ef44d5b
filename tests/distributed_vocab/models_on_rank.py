"""What the ranks run: a patched model whose LM head is tensor-parallel, beside the untouched one."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import VOCAB, logits_rows, sequences, tiny_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, parallelize_module
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from liger_trainer import apply_liger_kernel, revert

from .on_rank import assert_equal_everywhere, counted_collectives


def batch() -> dict[str, Tensor]:
    rows = sequences(4)
    found = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    found["labels"][0] = found["labels"][0].clamp(max=20)
    return found


def loss_and_gradients(model: nn.Module, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch(), **options).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            assert isinstance(gradient, DTensor) == isinstance(parameter, DTensor), name
            gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def torch_style(when: str, layouts: str) -> None:
    """torch's own parallelize_module on the head, before or after patching."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_llama(tie_word_embeddings=False)
    untouched = copy.deepcopy(model)
    style = ColwiseParallel(output_layouts=Replicate())
    if layouts == "sequence-parallel input":
        style = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    elif layouts == "divided output":
        style = ColwiseParallel(use_local_output=False)
    options = {"rms_norm": False, "mlp": False, "rope": False}
    if when == "before":
        apply_liger_kernel(model, **options)
    if layouts == "sequence-parallel input":
        spread = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
        parallelize_module(model, mesh, {"lm_head": spread})
    parallelize_module(model, mesh, {"lm_head": style})
    if when == "after":
        report = apply_liger_kernel(model, **options)
        assert report.counts() == {"fused_linear_cross_entropy": 1}, report
    assert isinstance(model.lm_head.weight, DTensor)
    n = torch.tensor(29.0)
    for extra in ({}, {"num_items_in_batch": n}):
        expected = loss_and_gradients(untouched, **extra)
        with logits_rows() as seen, counted_collectives() as counts:
            found = loss_and_gradients(model, **extra)
        assert_same(found, expected)
        assert counts["all_gather_into_tensor"] == counts["all_reduce"] == 1
        assert seen.rows == 0
        assert_equal_everywhere(found[0])
    # Logits are there for whoever reads them, before the loss, after it, and without labels.
    inputs = batch()
    logits = model(**inputs).logits
    if layouts != "divided output":
        expected_logits = untouched(**inputs).logits
        torch.testing.assert_close(logits + 0, expected_logits, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            evaluated = model(**inputs)
        torch.testing.assert_close(evaluated.logits + 0, expected_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evaluated.loss, untouched(**inputs).loss, rtol=1e-5, atol=1e-6)
        del inputs["labels"]
        torch.testing.assert_close(model(**inputs).logits, expected_logits, rtol=1e-5, atol=1e-5)


def local_output() -> None:
    """A head whose hook hands out this rank's logits is asked for them, and gives them with their gradient."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_llama(tie_word_embeddings=False)
    untouched = copy.deepcopy(model)
    apply_liger_kernel(model)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    model.lm_head._liger_deferring = True
    hidden = torch.randn(2, 3, 32, requires_grad=True)
    logits = model.lm_head(hidden)
    whole = F.linear(hidden, untouched.lm_head.weight)
    mine = whole.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    torch.testing.assert_close(logits, mine)
    (found,) = torch.autograd.grad(logits.square().sum(), hidden)
    torch.testing.assert_close(found, torch.autograd.grad(whole.square().sum(), hidden)[0], rtol=1e-4, atol=1e-5)


def log_probs_of_rows() -> None:
    """log_softmax and gather of a tensor-parallel head's deferred logits, as reinforcement learning takes them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_llama(tie_word_embeddings=False)
    untouched = copy.deepcopy(model)
    apply_liger_kernel(model)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    hidden = torch.randn(2, 3, 32)
    index = torch.randint(VOCAB, (2, 3, 1), generator=torch.Generator().manual_seed(0))
    model.lm_head._liger_deferring = True
    with logits_rows() as seen:
        found = model.lm_head(hidden).log_softmax(-1).gather(-1, index)
    assert seen.rows == 0
    expected = F.linear(hidden, untouched.lm_head.weight).log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cut = model.lm_head(hidden)[..., : VOCAB - 20]  # ends inside the last rank's part
    labels = index.clamp(max=VOCAB - 30).flatten()
    found = F.cross_entropy(cut.view(-1, VOCAB - 20), labels)
    whole = F.linear(hidden, untouched.lm_head.weight)[..., : VOCAB - 20]
    torch.testing.assert_close(found, F.cross_entropy(whole.flatten(0, 1), labels), rtol=1e-5, atol=1e-5)
    with logits_rows() as seen:
        likeliest = model.lm_head(hidden)[..., : VOCAB - 20].argmax(-1)
    assert seen.rows == 0
    assert torch.equal(likeliest, whole.argmax(-1))


def transformers_plan(folder: str) -> dict[str, int]:
    """A model that transformers loads with its own tensor-parallel plan, patched and restored."""
    untouched = LlamaForCausalLM.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    )
    assert isinstance(model.lm_head.weight, DTensor)
    assert_same(loss_and_gradients(model), expected := loss_and_gradients(untouched))
    report = apply_liger_kernel(model)
    with logits_rows() as seen:
        found = loss_and_gradients(model)
    assert_same(found, expected)
    assert seen.rows == 0
    with torch.no_grad():
        logits = model(**batch()).logits + 0
    torch.testing.assert_close(logits, untouched(**batch()).logits, rtol=1e-4, atol=1e-5)
    assert "forward" in vars(model.lm_head)
    revert(model)
    assert_same(loss_and_gradients(model), expected)
    return report.counts()
