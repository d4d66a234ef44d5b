"""Heads with peft's adapters in patched models, against the untouched peft model: loss, every gradient, and memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_models import HIDDEN, VOCAB, tiny_llama
from torch.nn import functional as F
from wide_tensors import MadeTensors, wide_tensors

import liger_trainer
from liger_trainer import is_patched, revert
from liger_trainer.patching.deferred_logits import DeferredLogits
from liger_trainer.patching.lazy_logits import LazyLogits

peft = pytest.importorskip("peft")

TILE_ROWS = 5  # more than the adapters' rank, so that their weight is not taken for logits
HEAD_ONLY = {"rope": False, "rms_norm": False, "layer_norm": False, "mlp": False}
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
CONFIGS = {
    "lora": {**ON_HEAD, "lora_alpha": 7},
    "rslora": {**ON_HEAD, "use_rslora": True},
    "dropout": {**ON_HEAD, "lora_dropout": 0.4},
    "bias": {**ON_HEAD, "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(name="lora", dtype=torch.float32, patch_first=False, bias=False, **options):
    """A model with an adapter on its head, the same one every time, and one that is patched."""
    models = []
    for patched in (False, True):
        model = tiny_llama().to(dtype).train()
        if bias:
            torch.manual_seed(1)
            model.lm_head = torch.nn.Linear(HIDDEN, VOCAB, dtype=dtype)
        if patched and patch_first:
            patch(model, dtype)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **{**CONFIGS[name], **options})
        model = peft.get_peft_model(model, config)
        if patched and not patch_first:
            assert not patch(model, dtype).skipped
        models.append(model)
    return models


def patch(model, dtype=torch.float32, **options):
    tile_bytes = TILE_ROWS * VOCAB * dtype.itemsize
    return liger_trainer.apply_liger_kernel(model, **{**HEAD_ONLY, "tile_bytes": tile_bytes, **options})


def batch():
    ids = torch.randint(3, VOCAB, (3, 14), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **inputs):
    torch.manual_seed(4)  # of the dropout
    outputs = model(**batch(), **inputs)
    outputs.loss.backward()
    return outputs


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model, reference, tolerance=1e-5, deferred=True, **inputs):
    for each in (model, reference):
        each.zero_grad()
    outputs, expected = step(model, **inputs), step(reference, **inputs)
    assert isinstance(outputs.logits, DeferredLogits) == deferred
    if deferred:
        assert outputs.logits.cell.value is None and outputs.logits.head is not None
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name
    return outputs, expected


@pytest.mark.parametrize("patch_first", [False, True], ids=["adapted first", "patched first"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_loss_and_gradients(name, bias, patch_first):
    reference, model = adapted(name, bias=bias, patch_first=patch_first)
    assert_same(model, reference)
    assert_same(model, reference, num_items_in_batch=torch.tensor(50))
    assert any("lm_head" in each and ("lora_B" in each or name == "saved") for each in gradients(model))


@pytest.mark.parametrize("patch_first", [False, True], ids=["adapted first", "patched first"])
def test_neither_logits_nor_a_second_weight_are_made(patch_first):
    reference, model = adapted(patch_first=patch_first)
    with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as wide:
        step(model)
    assert not wide
    with MadeTensors() as ours:
        step(model)
    assert max(ours.elements) < VOCAB * HIDDEN
    with MadeTensors() as theirs:
        step(reference)
    assert max(theirs.elements) >= VOCAB * HIDDEN


def test_gradients_accumulate():
    reference, model = adapted()
    for _ in range(3):
        step(model)
        step(reference)
    ours = gradients(model)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_several_adapters_and_a_choice_of_them():
    reference, model = adapted()
    for each in (reference, model):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **CONFIGS["bias"])
        each.add_adapter("second", config)
    for active in (["default", "second"], ["second"], ["default"]):
        for each in (reference, model):
            each.base_model.set_adapter(active)
        assert_same(model, reference)


def test_merged_unmerged_and_switched_off():
    reference, model = adapted()
    for each in (reference, model):
        each.merge_adapter()
        each.get_input_embeddings().weight.requires_grad_()
    assert_same(model, reference)
    for each in (reference, model):
        each.unmerge_adapter()
    assert_same(model, reference)
    with model.disable_adapter(), reference.disable_adapter():
        assert_same(model, reference)
    for each in (reference, model):
        each.merge_adapter()
    with model.disable_adapter(), reference.disable_adapter():
        assert_same(model, reference, deferred=False)  # unmerges
    assert not model.get_output_embeddings().merged
    reference, model = (each.merge_and_unload().requires_grad_() for each in (reference, model))
    assert_same(model, reference)


def test_reverted_it_is_as_it_was():
    reference, model = adapted()
    step(model)
    head = model.get_output_embeddings()
    assert "forward" not in vars(head) and is_patched(head.base_layer)
    revert(model)
    assert not any(is_patched(module) for module in model.modules())
    assert [type(each) for each in model.modules()] == [type(each) for each in reference.modules()]
    assert_same(model, reference, tolerance=0, deferred=False)


def test_a_forward_that_fails_leaves_no_trace():
    _, model = adapted()
    with pytest.raises((IndexError, ValueError)):
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, VOCAB + 7]]))
    assert "forward" not in vars(model.get_output_embeddings())
    assert type(model(batch()["input_ids"]).logits) is torch.Tensor


def test_logits_can_still_be_read():
    reference, model = adapted()
    outputs, expected = assert_same(model, reference)
    assert outputs.logits.requires_grad
    for use in (lambda x: x[:, -2:] + 0, lambda x: x.reshape(-1, VOCAB)[3:5] + 0, lambda x: x + 0):
        torch.testing.assert_close(use(outputs.logits), use(expected.logits))
    assert torch.equal(outputs.logits.argmax(-1), expected.logits.argmax(-1))
    chosen = batch()["input_ids"].unsqueeze(-1)
    ours, theirs = (each.log_softmax(-1).gather(-1, chosen) for each in (outputs.logits, expected.logits))
    torch.testing.assert_close(ours, theirs)


def test_a_loss_of_ones_own_on_some_rows_of_the_logits():
    reference, model = adapted()
    labels = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(6))
    for each in (reference, model):
        with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as wide:
            logits = each(**batch()).logits[..., 3:-2, :]
            F.cross_entropy(logits.reshape(-1, VOCAB), labels.flatten()).backward()
        assert bool(wide) == (each is reference)
    ours = gradients(model)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda logits: logits.masked_fill(torch.arange(VOCAB) == 5, -1e4), False),
        (lambda logits: logits * torch.linspace(0.5, 1.5, VOCAB), False),
        (lambda logits: logits.transpose(0, 1), True),
        (lambda logits: logits * 0.7, True),
        (lambda logits: 3 * torch.tanh(logits / 3), True),
    ],
    ids=["filled", "scaled by class", "transposed", "scaled", "capped"],
)
def test_what_a_model_does_to_its_logits(change, fused):
    """What has one number a class is of the head's weight alone: with an adapter beside it logits are built."""
    reference, model = adapted()
    labels = torch.randint(6, VOCAB, (42,), generator=torch.Generator().manual_seed(6))
    for each in (reference, model):
        logits = change(each(**batch()).logits)
        assert each is reference or (isinstance(logits, DeferredLogits) and logits.cell.value is None) == fused
        F.cross_entropy(logits.reshape(-1, VOCAB), labels).backward()
    ours = gradients(model)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_builds_no_logits_until_they_are_read():
    reference, model = (each.eval() for each in adapted())
    with torch.no_grad():
        with wide_tensors(VOCAB, rows=TILE_ROWS, hidden_size=HIDDEN) as wide:
            outputs = model(**batch())
            classes = outputs.logits.argmax(-1)
        expected = reference(**batch())
    assert isinstance(outputs.logits, LazyLogits) and not wide
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert torch.equal(classes, expected.logits.argmax(-1))
    torch.testing.assert_close(outputs.logits + 0, expected.logits)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_fp32_on_a_head_in_bf16(autocast):
    """As peft makes them by itself."""
    reference, model = adapted(dtype=torch.bfloat16)
    assert model.get_output_embeddings().lora_B["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        assert_same(model, reference, tolerance=2e-2)


def test_gradient_checkpointing():
    reference, model = adapted()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_same(model, reference)


def test_only_the_heads_adapter_is_trained():
    reference, model = adapted(target_modules=["lm_head"])
    assert_same(model, reference)


def test_a_copy_is_patched_as_well():
    reference, model = adapted()
    assert_same(*(copy.deepcopy(each.base_model.model) for each in (model, reference)))


def test_an_adapter_for_each_row_builds_logits():
    reference, model = adapted()
    for each in (reference, model):
        torch.manual_seed(5)
        each.add_adapter(
            "second", peft.LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **CONFIGS["lora"])
        )
        each.eval()
    names = ["default", "second", "__base__"]
    ours, theirs = (each(**batch(), adapter_names=names) for each in (model, reference))
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_loss_on_logits_that_exist():
    reference = adapted()[0]
    model = copy.deepcopy(reference)
    report = patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert report.counts() == {"cross_entropy": 1}
    assert_same(model, reference, deferred=False)


@pytest.mark.parametrize("patch_first", [False, True], ids=["adapted first", "patched first"])
def test_a_dora_is_left_alone_and_says_so(patch_first):
    reference = tiny_llama()
    models = []
    for patched in (False, True):
        model = copy.deepcopy(reference)
        if patched and patch_first:
            patch(model, rope=True)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **ON_HEAD)
        model = peft.get_peft_model(model, config)
        if patched and not patch_first:
            (skipped,) = patch(model, rope=True).skipped
            assert "its adapter 'default' is a DoraLinearVariant, not a plain LoRA" in skipped.reason
        models.append(model)
    assert_same(models[1], models[0], deferred=False)


def test_a_layer_that_computes_otherwise_is_left_alone(monkeypatch):
    reference = adapted()[0]
    head = type(reference.get_output_embeddings())
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda self, x, *args, **kwargs: 1.01 * forward(self, x, *args, **kwargs))
    model = copy.deepcopy(reference)
    (skipped,) = patch(model, rope=True).skipped
    assert "from its base layer's and its adapters'" in skipped.reason
    assert_same(model, reference, deferred=False)


def test_the_check_changes_nothing():
    reference = adapted("dropout")[0]
    state = torch.get_rng_state()
    modes = [each.training for each in reference.modules()]
    patch(reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in reference.modules()] == modes
    reference.merge_adapter()
    reference.base_model.disable_adapter_layers()
    revert(reference)
    patch(reference)
    assert reference.get_output_embeddings().merged


def test_compiled_it_is_correct():
    torch._dynamo.reset()
    reference, model = adapted()
    compiled = torch.compile(model, backend="eager")
    compiled(**batch()).loss.backward()
    step(reference)
    ours = gradients(model)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(ours[name], gradient)
