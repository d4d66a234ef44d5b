"""log_softmax followed by gather over deferred logits: the fused op's result, and logits for anything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wide_tensors import wide_tensors

from liger_trainer.patching.deferred_log_probs import DeferredLogProbs
from liger_trainer.patching.deferred_logits import defer

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
