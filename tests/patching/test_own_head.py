"""Heads that are linear layers by their class and have a forward of their own, against the untouched model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wide_tensors import wide_tensors

import liger_trainer
from liger_trainer.patching import revert
from liger_trainer.patching.lm_head import _check
from liger_trainer.patching.own_head import forward_with_product

V, ROWS = 97, 6


class PlainHead(nn.Linear):
    def forward(self, states):
        return F.linear(states, self.weight, bias=self.bias)


class ScaledHead(nn.Linear):
    """A learned factor a class, as Dory has it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logit_scale = nn.Parameter(torch.linspace(0.5, 1.5, self.out_features))

    def forward(self, states):
        return super().forward(states).float() * (self.logit_scale.float() * 1.25)


class BiasedHead(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("prior", torch.linspace(-2, 1, self.out_features))

    def forward(self, states):
        return torch.tanh((super().forward(states.relu()) + self.prior) / 5) * 5


class LongerHead(nn.Linear):
    """More classes from a second layer, whose logits are put behind: that needs them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.more = nn.Linear(self.in_features, 3, bias=False)

    def forward(self, states):
        return torch.cat((F.linear(states, self.weight, self.bias), self.more(states)), -1)[..., : self.out_features]


class AssigningHead(nn.Linear):
    def forward(self, states):
        logits = super().forward(states)
        logits[:1, 3:5] = 0.0
        return logits


class BrokenHead(nn.Linear):
    def forward(self, states):
        return super().forward(states) @ states.new_ones(2, 2)


class TwiceHead(nn.Linear):
    def forward(self, states):
        return super().forward(states) + super().forward(states.sin())


@pytest.fixture
def with_head(tiny):
    def make(head_class, dtype=torch.float32, **options):
        model = tiny("Llama")
        torch.manual_seed(5)
        model.set_output_embeddings(head_class(model.config.hidden_size, V, **{"bias": False, **options}))
        return model.to(dtype)

    return make


def patch(model, **options):
    return liger_trainer.apply_liger_kernel(
        model, tile_bytes=ROWS * V * 4, rope=False, rms_norm=False, mlp=False, **options
    )


SERVED = [PlainHead, ScaledHead, BiasedHead]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head_class", SERVED)
def test_same_loss_and_gradients_without_logits(with_head, batch, gradients, error, head_class, bias):
    reference = with_head(head_class, bias=bias)
    model = copy.deepcopy(reference)
    report = patch(model)
    assert [entry.class_name for entry in report.replaced] == [head_class.__name__]
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-4
    with wide_tensors(V, rows=ROWS, hidden_size=48) as ours:
        model(**batch).loss.backward()
    assert not ours
    with wide_tensors(V, rows=ROWS, hidden_size=48) as theirs:
        reference(**batch).loss.backward()
    assert theirs


@pytest.mark.parametrize("head_class", SERVED)
def test_logits_where_there_are_no_labels_and_as_before_after_revert(with_head, batch, head_class):
    reference = with_head(head_class)
    model = copy.deepcopy(reference)
    patch(model)
    ids, expected = batch["input_ids"], reference(batch["input_ids"]).logits
    assert type(model.lm_head).__name__ == head_class.__name__
    assert torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits + 0, expected)
    assert type(pickle.loads(pickle.dumps(model.lm_head))) is head_class
    revert(model)
    assert type(model.lm_head) is head_class
    assert torch.equal(model.train()(ids).logits, expected)


def test_in_bf16(with_head, batch, gradients, mean_error):
    reference = with_head(ScaledHead, torch.bfloat16)
    model, exact = copy.deepcopy(reference), copy.deepcopy(reference).double()
    patch(model)
    truth = gradients(exact, batch)
    assert mean_error(gradients(model, batch), truth) < 1.1 * mean_error(gradients(reference, batch), truth)


def test_compiled(with_head, batch, gradients, error):
    torch._dynamo.reset()
    reference = with_head(ScaledHead)
    model = copy.deepcopy(reference)
    patch(model)
    ours = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), batch)
    assert error({name.removeprefix("_orig_mod."): g for name, g in ours.items()}, gradients(reference, batch)) < 1e-4


def test_made_without_weights(batch, gradients, error, with_head):
    """Recognised and checked on the meta device, and served where the weights are by then."""
    reference = with_head(ScaledHead)
    model = copy.deepcopy(reference).to("meta")
    report = patch(model)
    assert [entry.class_name for entry in report.replaced] == ["ScaledHead"]
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    model.model.rotary_emb = reference.model.rotary_emb  # its buffers are not saved
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-4


@pytest.mark.parametrize(
    ("head_class", "reason"),
    [
        (LongerHead, "needs the logits' values"),
        (AssigningHead, "needs the logits' values"),
        (TwiceHead, "needs the logits' values"),
        (BrokenHead, "its forward raises RuntimeError: mat1 and mat2"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_heads_whose_logits_are_needed_are_left_alone(with_head, head_class, reason, check):
    model = with_head(head_class)
    report = liger_trainer.apply_liger_kernel(model, check=check)
    (skipped,) = [each for each in report.skipped if each.kind == "fused_linear_cross_entropy"]
    assert reason in skipped.reason
    assert type(model.lm_head) is head_class


def test_a_kernel_for_logits_that_exist_does_not_serve_them(with_head):
    report = liger_trainer.apply_liger_kernel(
        with_head(ScaledHead), cross_entropy=True, fused_linear_cross_entropy=False
    )
    assert "not a plain torch.nn.Linear" in next(e.reason for e in report.skipped if e.kind == "cross_entropy")


def test_a_wrong_change_is_caught_by_the_check(with_head, monkeypatch):
    from liger_trainer.patching import class_changes

    right = class_changes.Scaled.of_rows
    monkeypatch.setattr(class_changes.Scaled, "of_rows", lambda self, weight, *rest: right(self, weight * 1.001, *rest))
    assert "differs from PyTorch's here" in _check(with_head(ScaledHead).lm_head, True)


def test_frozen_and_without_a_share_in_the_result(with_head, batch, gradients, error):
    reference = with_head(ScaledHead)
    reference.lm_head.weight.requires_grad_(False)
    model = copy.deepcopy(reference)
    assert patch(model).replaced
    ours, theirs = gradients(model, batch), gradients(reference, batch)
    assert "lm_head.weight" not in ours
    assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head_class", SERVED)
def test_a_replaced_linear_function(with_head, batch, gradients, error, linear_of_zero3, head_class, bias):
    reference = with_head(head_class, bias=bias)
    model = copy.deepcopy(reference)
    assert [entry.class_name for entry in patch(model).replaced] == [head_class.__name__]
    assert error(gradients(model, batch), gradients(reference, batch)) < 1e-4
    with wide_tensors(V, rows=ROWS, hidden_size=48) as ours:
        model(**batch).loss.backward()
    assert not ours
    assert F.linear is linear_of_zero3


def test_a_replaced_linear_function_is_back_after_an_error(linear_of_zero3):
    head = BrokenHead(4, V)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        forward_with_product(BrokenHead.forward, head, lambda hidden: hidden @ head.weight.T, torch.randn(3, 4))
    assert F.linear is linear_of_zero3
