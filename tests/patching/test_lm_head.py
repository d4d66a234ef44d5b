"""The LM head and the loss behind it, against the untouched model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wide_tensors import wide_tensors

import liger_trainer
from liger_trainer.patching.counted_labels import CountedLabels, count_labels
from liger_trainer.patching.deferred_logits import DeferredLogits, defer
from liger_trainer.patching.lazy_logits import LazyLogits

V = 97  # the tiny models' vocabulary
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3"]
TILE_ROWS = 6
HEAD_ONLY = {"rope": False, "rms_norm": False, "layer_norm": False, "mlp": False}


def patch(model, **options):
    options = {**HEAD_ONLY, "tile_bytes": TILE_ROWS * V * 4, **options}
    return liger_trainer.apply_liger_kernel(model, **options)


def batch(b=3, s=9):
    torch.manual_seed(1)
    ids = torch.randint(3, V, (b, s))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def run(model, inputs, **kwargs):
    model.zero_grad()
    outputs = model(**inputs, **kwargs)
    outputs.loss.backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return outputs, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(model, reference, inputs, rtol=1e-5, **kwargs):
    outputs, gradients = run(model, inputs, **kwargs)
    expected, expected_gradients = run(reference, inputs, **kwargs)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=rtol, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        norm = expected_gradients[name].norm()
        assert (gradient - expected_gradients[name]).norm() <= 10 * rtol * norm + 1e-7, name
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients_without_logits(tiny, family):
    reference = tiny(family)
    model = copy.deepcopy(reference)
    patch(model)
    inputs = batch()
    assert_same(model, reference, inputs)
    with wide_tensors(V, rows=TILE_ROWS, hidden_size=48) as ours:
        run(model, inputs)
    assert not ours
    with wide_tensors(V, rows=TILE_ROWS, hidden_size=48) as theirs:
        run(reference, inputs)
    assert theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_tied_and_untied(tiny, family, tied):
    reference = tiny(family, tie_word_embeddings=tied)
    model = copy.deepcopy(reference)
    patch(model)
    assert_same(model, reference, batch())


def test_num_items_in_batch_and_shift_labels(tiny):
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    patch(model)
    inputs = batch()
    assert_same(model, reference, inputs, num_items_in_batch=torch.tensor(5))
    assert_same(model, reference, inputs, num_items_in_batch=7)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_same(model, reference, inputs, shift_labels=shifted)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
def test_bf16(tiny, pure):
    reference = tiny("Llama")
    if pure:
        reference = reference.bfloat16()
    model = copy.deepcopy(reference)
    patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
        assert_same(model, reference, batch(), rtol=5e-3)


def test_a_batch_with_nothing_to_learn_gives_zero(tiny):
    model = tiny("Llama")
    patch(model)
    inputs = batch()
    inputs["labels"].fill_(-100)
    outputs, gradients = run(model, inputs)
    assert outputs.loss.item() == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_gradient_checkpointing_and_frozen_head(tiny):
    for frozen in (False, True):
        reference = tiny("Llama")
        reference.lm_head.weight.requires_grad_(not frozen)
        model = copy.deepcopy(reference)
        patch(model)
        model.gradient_checkpointing_enable()
        assert_same(model, reference, batch())


def test_compiled_whole(tiny):
    torch._dynamo.reset()
    reference = tiny("Gemma2")
    model = copy.deepcopy(reference)
    patch(model)
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager"), reference, batch())


def test_the_loss_on_logits(tiny):
    reference = tiny("Gemma2")
    model = copy.deepcopy(reference)
    patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    outputs = assert_same(model, reference, batch())
    assert isinstance(outputs.logits, DeferredLogits)


def test_logits_of_a_training_step_can_still_be_read(tiny):
    reference = tiny("Gemma2")
    model = copy.deepcopy(reference)
    patch(model)
    outputs, expected = (each(**batch()) for each in (model, reference))
    assert isinstance(outputs.logits, DeferredLogits)
    assert outputs.logits.head.weight is None  # nothing is pinned
    assert outputs.logits.shape == expected.logits.shape
    assert outputs.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(outputs.logits.argmax(-1), expected.logits.argmax(-1))
    torch.testing.assert_close(outputs.logits + 0, expected.logits)
    torch.testing.assert_close(torch.softmax(outputs.logits, -1), expected.logits.softmax(-1))


def test_a_loss_of_ones_own_on_the_deferred_logits(tiny):
    """compute_loss functions read outputs.logits; cross entropy is fused there, and all else is right."""
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    patch(model)
    inputs = batch()
    target = inputs["labels"][:, 1:].reshape(-1)

    def gradients(each):
        logits = each(**inputs).logits
        shifted = logits[..., :-1, :]
        loss = F.cross_entropy(shifted.reshape(-1, V), target) + 0.1 * logits.float().log_softmax(-1).square().mean()
        each.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in each.parameters()]

    for ours, theirs in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_labels_the_head_returns_logits(tiny):
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    patch(model)
    ids = batch()["input_ids"]
    for mode in (True, False):
        logits = model.train(mode)(ids).logits
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, reference.train(mode)(ids).logits)
    assert torch.equal(
        model.generate(ids[:1], max_new_tokens=4, do_sample=False),
        reference.generate(ids[:1], max_new_tokens=4, do_sample=False),
    )


def test_replicas_of_data_parallel_return_logits(tiny):
    """nn.DataParallel, which Trainer chooses by itself on several GPUs, can gather nothing but tensors."""
    model = tiny("Llama")
    patch(model)
    replica = model._replicate_for_data_parallel()
    outputs = replica(**batch())
    assert type(outputs.logits) is torch.Tensor
    assert outputs.loss.isfinite()


def test_a_failing_forward_leaves_the_head_as_it_was(tiny):
    model = tiny("Llama")
    patch(model)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), labels=torch.full((1, 3), V + 5))
    assert type(model(batch()["input_ids"]).logits) is torch.Tensor


class TestEvaluation:
    @pytest.fixture
    def outputs(self, tiny):
        reference = tiny("Gemma2").eval()
        model = copy.deepcopy(reference)
        patch(model)
        with torch.no_grad():
            with wide_tensors(V, rows=TILE_ROWS, hidden_size=48) as wide:
                outputs = model(**batch())
            assert not wide
            return outputs, reference(**batch())

    def test_is_a_tensor_until_then_unbuilt(self, outputs):
        ours, theirs = outputs
        assert isinstance(ours.logits, torch.Tensor)
        assert isinstance(ours.logits, LazyLogits)
        with wide_tensors(V, rows=TILE_ROWS, hidden_size=48) as wide:
            assert ours.logits.shape == theirs.logits.shape
            assert ours.logits.dtype == theirs.logits.dtype
            assert ours.logits.device == theirs.logits.device
            assert len(ours.logits) == 3
            assert torch.is_floating_point(ours.logits) and not torch.is_complex(ours.logits)
        assert not wide
        torch.testing.assert_close(ours.loss, theirs.loss)

    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x.detach(),
            lambda x: x[..., ::2],
            lambda x: x.argmax(),
            lambda x: torch.cat([x, x]),
            lambda x: torch.from_numpy(x.numpy()),
            lambda x: torch.tensor(x.tolist()),
            lambda x: copy.deepcopy(x),
            lambda x: pickle.loads(pickle.dumps(x)),
            lambda x: x.float().softmax(-1),
            lambda x: x + x,
        ],
    )
    def test_any_use_builds_it(self, outputs, use):
        ours, theirs = outputs
        result = use(ours.logits)
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, use(theirs.logits))

    def test_cut_and_reshaped_they_stay_unbuilt(self, outputs):
        ours, theirs = outputs
        with wide_tensors(V, rows=TILE_ROWS, hidden_size=48) as wide:
            cut = ours.logits[:, :-1].reshape(-1, V)
            classes = ours.logits.argmax(-1), torch.argmax(cut, dim=-1)
            labels = torch.arange(len(cut)) % V
            losses = [F.cross_entropy(cut, labels) for _ in range(2)]
        assert isinstance(cut, LazyLogits) and not wide
        assert torch.equal(classes[0], theirs.logits.argmax(-1))
        assert torch.equal(classes[1], theirs.logits[:, :-1].flatten(0, 1).argmax(-1))
        expected = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), labels)
        for loss in losses:
            torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(cut + 0, theirs.logits[:, :-1].flatten(0, 1))

    def test_tuple_outputs(self, tiny):
        model = tiny("Llama").eval()
        patch(model)
        with torch.no_grad():
            loss, logits = model(**batch(), return_dict=False)[:2]
        assert isinstance(logits, LazyLogits)
        assert loss.isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_accelerate_under_mixed_precision(tiny, training):
    """accelerate wraps the forward in autocast and casts whatever it returns to fp32, in place of a plain loop."""
    accelerate = pytest.importorskip("accelerate")
    reference = tiny("Llama").train(training)
    model = copy.deepcopy(reference)
    patch(model)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    ours, theirs = accelerator.prepare_model(model), accelerator.prepare_model(reference)
    with torch.set_grad_enabled(training):
        with wide_tensors(V, rows=2 * TILE_ROWS, hidden_size=48) as wide:  # a bf16 tile has twice the rows
            outputs = ours(**batch())
        assert not wide
        expected = theirs(**batch())
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs.logits + 0, expected.logits, rtol=1e-2, atol=1e-2, check_dtype=not training)


@pytest.mark.parametrize(
    "index",
    [
        (..., slice(None, -1), slice(None)),
        (slice(None), slice(1, None)),
        (..., slice(None, 50)),
        (slice(None), slice(None), slice(None, 50)),
        (..., slice(3, 50)),
        (..., 4),
        (0,),
        (0, 1),
        (slice(None), -1),
        (slice(None), slice(None), torch.tensor([1, 5])),
        (torch.tensor([2, 0, 0]),),
        (torch.tensor([[True] * 9, [False] * 9, [True] * 9]),),
        (torch.tensor([True, False, True]), slice(2, 5), slice(None, 7)),
        (None, 0),
        (Ellipsis,),
        (..., slice(None, None, 2)),
    ],
    ids=str,
)
def test_every_index_is_that_of_the_logits(tiny, index):
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    patch(model)
    logits, expected = (each(**batch()).logits for each in (model, reference))
    torch.testing.assert_close(logits[index] + 0, expected[index])
    assert logits[index].shape == expected[index].shape


def test_the_count_of_labels_reaches_the_op(tiny, monkeypatch):
    """Without it the host would wait at the head for the whole forward."""
    from liger_trainer.patching import deferred_logits

    bounds, op = [], deferred_logits.linear_cross_entropy

    def recorded(*args, max_valid, **kwargs):
        bounds.append(max_valid)
        return op(*args, max_valid=max_valid, **kwargs)

    model = tiny("Llama")
    patch(model)
    monkeypatch.setattr(deferred_logits, "linear_cross_entropy", recorded)
    inputs = batch()
    run(model, inputs)
    assert bounds == [int((inputs["labels"] != -100).sum())]


class TestCountedLabels:
    labels = torch.tensor([[1, -100, 3], [-100, -100, 6]])

    def test_travels_through_the_causal_shift(self):
        counted = count_labels(self.labels)
        shifted = F.pad(counted, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to("cpu")
        assert isinstance(shifted, CountedLabels)
        assert shifted.upper_bound(-100) == 3
        assert shifted.upper_bound(0) is None
        assert type(shifted.plain()) is torch.Tensor

    @pytest.mark.parametrize(
        "change",
        [
            lambda y: y.repeat(2, 1),
            lambda y: torch.cat([y, y]),
            lambda y: y[[0, 0, 1]],
            lambda y: y[torch.tensor([0, 0])],
            lambda y: y.clamp(min=0),
            lambda y: F.pad(y, (0, 1), value=0),
            lambda y: F.pad(y, (0, 1), mode="replicate"),
            lambda y: y.masked_fill(y == -100, 0),
            lambda y: y.expand(2, 2, 3),
            lambda y: y + 1,
            lambda y: y.float(),
        ],
    )
    def test_anything_that_may_add_labels_forgets_the_count(self, change):
        assert type(change(count_labels(self.labels))) is torch.Tensor
        assert torch.equal(change(count_labels(self.labels)), change(self.labels))


def test_heads_that_are_not_linear_are_left_alone(tiny):
    model = tiny("Llama")

    class Scaled(nn.Module):
        def __init__(self, hidden_size):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(V, hidden_size))

        def forward(self, x):
            return F.linear(x, self.weight) * 2

    model.set_output_embeddings(Scaled(model.config.hidden_size))
    report = liger_trainer.apply_liger_kernel(model)
    (skipped,) = [each for each in report.skipped if each.kind == "fused_linear_cross_entropy"]
    assert "not a plain torch.nn.Linear" in skipped.reason
    assert type(model.lm_head) is Scaled


def test_a_wrong_loss_is_caught_by_the_check(tiny, monkeypatch):
    from liger_trainer.patching import deferred_logits

    right = deferred_logits.linear_cross_entropy
    monkeypatch.setattr(deferred_logits, "linear_cross_entropy", lambda *a, **k: right(*a, **k) * 1.01)
    report = liger_trainer.apply_liger_kernel(tiny("Llama"))
    (skipped,) = [each for each in report.skipped if each.kind == "fused_linear_cross_entropy"]
    assert "differs from PyTorch's" in skipped.reason


def test_peft_adapter_on_the_head_stays_correct(tiny):
    peft = pytest.importorskip("peft")
    reference = tiny("Llama")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(reference, config)
    model = copy.deepcopy(adapted)
    report = patch(model, rms_norm=True)
    assert not report.skipped
    assert isinstance(assert_same(model, adapted, batch()).logits, DeferredLogits)


def test_patched_before_peft_wraps_it(tiny):
    peft = pytest.importorskip("peft")
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    patch(model)
    for config in (
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ):
        torch.manual_seed(3)
        ours = peft.get_peft_model(copy.deepcopy(model), config)
        torch.manual_seed(3)
        theirs = peft.get_peft_model(copy.deepcopy(reference), config)
        assert_same(ours, theirs, batch())


def test_an_operation_that_needs_the_values_is_named_once(tiny, monkeypatch):
    monkeypatch.setattr("liger_trainer.patching.deferred_logits._ANNOUNCED", set())
    reference = tiny("Llama")
    original = type(reference).loss_function.fget

    def sigmoid_first(self):
        loss = original(self)
        return lambda logits, **kwargs: loss(logits=torch.sigmoid(logits), **kwargs)

    monkeypatch.setattr(type(reference), "loss_function", property(sigmoid_first))
    model = copy.deepcopy(reference)
    patch(model)
    with pytest.warns(UserWarning, match="the fused loss knows no sigmoid of logits"):
        assert_same(model, reference, batch())
    with warnings.catch_warnings(action="error"):
        run(model, batch())


def test_logits_that_are_read_after_the_loss_are_no_reason_to_warn(tiny):
    model = tiny("Llama")
    patch(model)
    outputs, _ = run(model, batch())
    with warnings.catch_warnings(action="error"):
        assert torch.sigmoid(outputs.logits).shape == outputs.logits.shape


@pytest.mark.parametrize("bias", [False, True])
def test_classes_that_a_model_cuts_off_take_no_part(bias):
    """As models whose vocabulary is padded slice their logits before the loss."""
    torch.manual_seed(0)
    head = nn.Linear(8, 13, bias=bias)
    hidden, labels = torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,))
    leaves = [hidden, *head.parameters()]
    expected = F.cross_entropy(head(hidden)[..., :11], labels)
    found = F.cross_entropy(defer(head, hidden, logits=None, tile_bytes=3 * 13 * 4)[..., :11], labels)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("linear_of_zero3")
def test_a_replaced_linear_function(tiny):
    reference = tiny("Llama")
    model = copy.deepcopy(reference)
    assert patch(model).counts()["fused_linear_cross_entropy"] == 1
    assert isinstance(assert_same(model, reference, batch()).logits, DeferredLogits)
