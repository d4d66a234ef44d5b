"""Logits of single classes that a model scales, shifts or fills before the loss: done to the head's rows instead."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from wide_tensors import wide_tensors

import liger_trainer
from liger_trainer.kernels._vocabulary import VocabularyShard
from liger_trainer.patching.deferred_logits import DeferredLogits, defer

V, H, ROWS = 131, 24, 5
LIST = [3, 5, *range(70, 90)]
CHOSEN = torch.zeros(V, dtype=torch.bool)
CHOSEN[LIST] = True
LEAST = torch.finfo(torch.float32).min


def assign(index, value):
    def change(logits, vector):
        if isinstance(logits, torch.Tensor):
            logits = logits.clone()
        logits[index] = value
        return logits

    return change


CHANGES = {
    "assigned": assign((slice(None), slice(None), LIST), LEAST),
    "assigned through an ellipsis": assign((..., torch.tensor(LIST)), -1e4),
    "assigned by a mask": assign((..., CHOSEN), float("-inf")),
    "assigned to a slice": assign((slice(None), ..., slice(100, None)), -7.0),
    "assigned to one": assign((..., -1), 2.5),
    "masked_fill": lambda x, v: x.masked_fill(CHOSEN, -1e9),
    "torch.masked_fill": lambda x, v: torch.masked_fill(x, CHOSEN[None, None], float("-inf")),
    "times": lambda x, v: x * v,
    "times in fp32": lambda x, v: x.float() * v[None, None],
    "torch.mul": lambda x, v: torch.mul(x, v),
    "plus": lambda x, v: x + v,
    "torch.add": lambda x, v: torch.add(x, v[None]),
    "cut, then plus": lambda x, v: x[..., :100] + v[:100],
    "plus, then cut": lambda x, v: (x + v)[..., :100],
    "shifted": lambda x, v: (x * v).masked_fill(CHOSEN, -50.0)[:, :-1].contiguous(),
    "one after the other": lambda x, v: ((x * v + v.sin()).masked_fill(CHOSEN, -9.0) * v.cos()) * 0.7,
    "capped afterwards": lambda x, v: torch.tanh((x + v) / 3) * 3,
}


def make(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias).to(dtype)
    hidden = torch.randn(3, 7, H, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randn(V, dtype=dtype, requires_grad=True)


def deferred(head, hidden):
    return defer(head, hidden, logits=None, tile_bytes=ROWS * V * 4)


def loss(logits, labels):
    n = logits.shape[-1]
    return F.cross_entropy(logits.float().reshape(-1, n), labels[: logits.shape[0], : logits.shape[1]].reshape(-1) % n)


@pytest.fixture
def labels():
    """Some of them are of filled classes."""
    labels = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = torch.tensor([3, 75, V - 1])
    return labels


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradients_are_the_logits(name, bias, labels):
    head, hidden, vector = make(bias)
    if name in ("assigned", "assigned by a mask", "torch.masked_fill"):
        labels = torch.where(CHOSEN[labels], 1, labels)  # else the loss is infinite
    logits = CHANGES[name](deferred(head, hidden), vector)
    assert isinstance(logits, DeferredLogits) and logits.cell.value is None
    reference = [head.weight, *([head.bias] if bias else []), hidden, vector]
    doubled = [leaf.detach().double().requires_grad_() for leaf in reference]
    exact = CHANGES[name](F.linear(doubled[-2], doubled[0], doubled[1] if bias else None), doubled[-1])
    assert logits.shape == exact.shape
    ours, expected = loss(logits, labels), loss(exact, labels)
    assert torch.isfinite(expected)
    torch.testing.assert_close(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours, reference, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, doubled, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_only_tiles_of_logits_exist(name, labels):
    head, hidden, vector = make()
    width = CHANGES[name](deferred(head, hidden), vector).shape[-1]
    with wide_tensors(width, rows=ROWS * V // width, hidden_size=H) as found:
        loss(CHANGES[name](deferred(head, hidden), vector), labels).backward()
    assert not found


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("shifted", "capped afterwards")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_built_they_are_bit_by_bit_what_the_model_makes(name, dtype):
    head, hidden, vector = make(bias=True, dtype=dtype)
    logits, expected = (CHANGES[name](x, vector) for x in (deferred(head, hidden), head(hidden)))
    assert logits.dtype == expected.dtype
    assert torch.equal(logits.materialize(), expected)


def test_labels_of_filled_classes_send_their_gradient_nowhere_else():
    """The loss is the largest number or infinite; what the log-sum-exp gives its inputs is finite all the same."""
    head, hidden, _ = make(bias=True)
    leaves = [hidden, *head.parameters()]
    labels = torch.full((3, 7), LIST[0])
    pairs = []
    for logits in (deferred(head, hidden), head(hidden) * 1):
        logits[..., LIST] = LEAST
        pairs.append(torch.autograd.grad(loss(logits, labels), leaves))
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.isfinite(theirs).all() and theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [LEAST, float("-inf"), -1e4])
def test_values_that_the_products_dtype_does_not_know(value, labels):
    head, hidden, _ = make()
    results = []
    for make_logits in (lambda: deferred(head, hidden), lambda: head(hidden)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = make_logits().float().masked_fill(CHOSEN, value)
            results.append(loss(logits, torch.where(CHOSEN[labels], 1, labels)))
    assert torch.isfinite(results[0])
    torch.testing.assert_close(*results, rtol=2e-3, atol=0)


OTHERS = {
    "scaled before": lambda x, v: (x * 2) + v,
    "capped before": lambda x, v: torch.tanh(x) * v,
    "by": lambda x, v: x / (1.5 + v.square()),
    "a number a row": lambda x, v: x + v[:7, None],
    "a number each": lambda x, v: x * v[:21].view(3, 7, 1).expand(3, 7, V),
    "rows too": lambda x, v: assign((slice(None), 0, LIST), 1.0)(x, v),
    "rows": lambda x, v: assign((0,), 1.0)(x, v),
    "tensors": lambda x, v: assign((..., [1, 2]), v[:2].detach())(x, v),
    "masked rows": lambda x, v: x.masked_fill(torch.arange(7)[:, None] > 3, 0.0),
    "alpha": lambda x, v: torch.add(x, v, alpha=2),
    "everything": lambda x, v: assign((...,), 0.5)(x, v),
}


@pytest.mark.filterwarnings("ignore:the logits are built")
@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_builds_them(name):
    head, hidden, vector = make(bias=True)
    ours, expected = (OTHERS[name](x, vector) for x in (deferred(head, hidden), head(hidden)))
    torch.testing.assert_close(ours + 0, expected)


def test_log_probs_and_predictions_see_the_change(labels):
    head, hidden, vector = make()

    def both(logits):
        logits = (logits + vector).masked_fill(CHOSEN, -1e9)
        return logits.log_softmax(-1).gather(-1, labels[..., None]), logits.argmax(-1)

    for ours, theirs in zip(both(deferred(head, hidden)), both(head(hidden)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_change_does_not_follow_the_tensor_that_it_came_from():
    head, hidden, vector = make()
    logits = deferred(head, hidden) + vector
    expected = head(hidden) + vector
    with torch.no_grad():
        vector.zero_()
    torch.testing.assert_close(logits.materialize(), expected)


@pytest.mark.parametrize("first", [0, 50, 100, 125, V])
def test_rows_of_a_shard_are_those_of_the_whole(first):
    head, hidden, vector = make(bias=True)
    whole = (deferred(head, hidden) * vector + vector).masked_fill(CHOSEN, -3.0)[..., :120]
    part = whole._replace(head=copy.copy(whole.head), cell=copy.copy(whole.cell))
    part.head.shard = VocabularyShard(None, V, first, 50)
    part.head.weight, part.head.bias = head.weight[first : first + 50], head.bias[first : first + 50]
    for ours, theirs in zip(part.rows(), whole.rows(), strict=True):
        assert torch.equal(ours, theirs[first : first + 50])


class Changing(transformers.LlamaForCausalLM):
    """What Chameleon and sequence-to-sequence models do: classes are filled, and a buffer is added."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("final_logits_bias", torch.linspace(-1, 1, config.vocab_size)[None])

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        logits = logits + self.final_logits_bias
        logits[:, :, list(range(10, 20))] = torch.finfo(logits.dtype).min
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_a_model(tiny, batch, gradients, error, compiled):
    torch._dynamo.reset()
    model = tiny("Llama")
    model.__class__ = Changing
    model.register_buffer("final_logits_bias", torch.linspace(-1, 1, model.config.vocab_size)[None])
    reference = copy.deepcopy(model)
    liger_trainer.apply_liger_kernel(model)
    batch["labels"][(batch["labels"] >= 10) & (batch["labels"] < 20)] = -100
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    ours = gradients(run, batch)
    assert error({name.removeprefix("_orig_mod."): g for name, g in ours.items()}, gradients(reference, batch)) < 1e-4
    with warnings.catch_warnings(action="error"), torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits + 0, reference.eval()(**batch).logits)
