"""log_softmax followed by gather over deferred logits: the fused op's result, and logits for anything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wide_tensors import wide_tensors

from liger_trainer.patching.deferred_log_probs import DeferredLogProbs
from liger_trainer.patching.deferred_logits import defer, label_smoothing

V, H, ROWS = 131, 24, 5


def make(bias=False):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias)
    hidden = torch.randn(3, 7, H, requires_grad=True)
    return head, hidden, torch.randint(V, (3, 7))


GATHERS = {
    "functional": lambda logits, labels: F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)),
    "torch": lambda logits, labels: torch.gather(torch.log_softmax(logits, 2), 2, labels.unsqueeze(-1)),
    "method": lambda logits, labels: logits.log_softmax(-1).gather(dim=-1, index=labels[..., None]),
    "float": lambda logits, labels: F.log_softmax(logits.float(), -1, dtype=torch.float32).gather(2, labels[..., None]),
    "shifted": lambda logits, labels: F.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:].unsqueeze(-1)),
    "scaled": lambda logits, labels: (logits / 0.7).log_softmax(-1).gather(-1, labels.unsqueeze(-1)),
    "capped": lambda logits, labels: F.log_softmax(torch.tanh(logits / 3) * 3, -1).gather(-1, labels.unsqueeze(-1)),
}


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("bias", [False, True])
def test_gathered_is_what_the_logits_give(name, bias):
    head, hidden, labels = make(bias)
    ours = GATHERS[name](defer(head, hidden, logits=None, tile_bytes=ROWS * V * 4), labels).squeeze(-1)
    expected = GATHERS[name](F.linear(hidden, head.weight, head.bias), labels).squeeze(-1)
    torch.testing.assert_close(ours, expected)
    leaves = [hidden, *head.parameters()]
    upstream = torch.randn_like(ours)
    for one, two in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GATHERS)
def test_only_tiles_of_logits_exist(name):
    head, hidden, labels = make()
    with torch.no_grad(), wide_tensors(V, rows=ROWS, hidden_size=H) as found:
        GATHERS[name](defer(head, hidden, logits=None, tile_bytes=ROWS * V * 4), labels)
    assert not found


@pytest.mark.parametrize(
    "use",
    [
        lambda p, labels: p.gather(-1, labels.unsqueeze(-1).expand(-1, -1, 2)),
        lambda p, labels: p.gather(1, labels.unsqueeze(-1) % 7),
        lambda p, labels: p.exp(),
        lambda p, labels: torch.exp(p),
        lambda p, labels: p[..., 3],
        lambda p, labels: -(p * 2 + 1 - p) / 3,
        lambda p, labels: p.sum(-1),
        lambda p, labels: torch.stack([p, p]),
        lambda p, labels: F.nll_loss(p.flatten(0, 1), labels.flatten()),
        lambda p, labels: F.nll_loss(p, labels[:, :1].expand(-1, V) % 7),
    ],
)
def test_any_other_use_builds_it(use):
    head, hidden, labels = make()
    deferred = defer(head, hidden, logits=None, tile_bytes=None).log_softmax(-1)
    assert isinstance(deferred, DeferredLogProbs)
    assert deferred.shape == (3, 7, V) and deferred.dtype == torch.float32
    expected = F.linear(hidden, head.weight).log_softmax(-1)
    torch.testing.assert_close(use(deferred, labels), use(expected, labels))


def test_along_another_dimension_it_is_the_logits():
    head, hidden, _ = make()
    ours = F.log_softmax(defer(head, hidden, logits=None, tile_bytes=None), dim=1)
    torch.testing.assert_close(ours, F.linear(hidden, head.weight).log_softmax(1))


LOSSES = {
    "functional": lambda p, labels: F.nll_loss(p, labels),
    "module": lambda p, labels: nn.NLLLoss(reduction="sum", ignore_index=7)(p, labels),
    "weighted": lambda p, labels: F.nll_loss(p, labels, weight=torch.linspace(0.1, 2, V)),
    "each": lambda p, labels: F.nll_loss(p, labels, reduction="none").square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nll_loss_is_the_cross_entropy_of_the_logits(name):
    """As ProphetNet takes it, whose streams change places before."""
    head, hidden, labels = make(bias=True)
    labels[0, 2:4] = -100 if name != "module" else 7
    leaves = [hidden, *head.parameters()]
    results = []
    for logits in (
        defer(head, hidden, logits=None, tile_bytes=ROWS * V * 4),
        F.linear(hidden, head.weight, head.bias),
    ):
        flat = logits.transpose(0, 1).contiguous().view(-1, V)
        loss = LOSSES[name](F.log_softmax(flat, dim=-1, dtype=torch.float32), labels.t().reshape(-1))
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nll_loss_needs_only_tiles_of_logits():
    head, hidden, labels = make()
    with wide_tensors(V, rows=ROWS, hidden_size=H) as found:
        flat = torch.transpose(defer(head, hidden, logits=None, tile_bytes=ROWS * V * 4), 0, 1).contiguous().view(-1, V)
        F.nll_loss(flat.log_softmax(-1), labels.t().reshape(-1)).backward()
    assert not found


def test_nll_loss_in_bf16_is_not_rounded_where_the_log_softmax_is_not():
    head, hidden, labels = make()
    head.bfloat16()
    logits = defer(head, hidden.bfloat16(), logits=None, tile_bytes=None).view(-1, V)
    loss = F.nll_loss(F.log_softmax(logits, -1, dtype=torch.float32), labels.view(-1))
    expected = F.cross_entropy(F.linear(hidden.bfloat16(), head.weight).view(-1, V).float(), labels.view(-1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_nll_loss_is_not_smoothed_behind_the_models_back():
    head, hidden, labels = make()
    with label_smoothing(0.3) as smoothing:
        flat = defer(head, hidden, logits=None, tile_bytes=None).view(-1, V)
        loss = F.nll_loss(flat.log_softmax(-1), labels.view(-1))
    assert not smoothing.applied
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden).view(-1, V), labels.view(-1)))


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (-3, -2), (0, 2), (-1, 0), (1, 1)])
def test_transposed_is_what_the_logits_give(dims):
    head, hidden, _ = make()
    ours = defer(head, hidden, logits=None, tile_bytes=None).transpose(*dims)
    expected = F.linear(hidden, head.weight).transpose(*dims)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours + 0, expected)
