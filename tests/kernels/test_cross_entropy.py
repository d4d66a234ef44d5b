"""cross_entropy against float64, forward and backward, both implementations."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from liger_trainer.kernels import cross_entropy

from .helpers import assert_close_to_reference, dtypes_of
from .loss_reference import doubled, reference_loss

OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "class_weights": {"class_weights": "random", "label_smoothing": 0.1},
}
SHAPES = [(1, 7), (5, 1), (3, 9, 13), (2, 1031), (0, 17)]


def make(shape, device, dtype, ignore=True):
    torch.manual_seed(sum(shape))
    logits = (torch.randn(shape, dtype=torch.float64) * 3).to(device, dtype)
    labels = torch.randint(shape[-1], shape[:-1]).to(device)
    if ignore and labels.numel() > 1:
        labels.view(-1)[::3] = -100
    return logits.requires_grad_(), labels


def check(logits, labels, dtype, reduction="mean", **options):
    call = dict(options)
    if "class_weights" in call:
        call["weight"] = call.pop("class_weights")
    loss = cross_entropy(logits, labels, reduction=reduction, **call)
    exact = logits.detach().double().requires_grad_()
    expected = reference_loss(
        exact.reshape(-1, exact.shape[-1]), labels.reshape(-1), reduction=reduction, **doubled(options)
    )
    if reduction == "none":
        expected = expected.view(labels.shape)
    upstream = torch.randn_like(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    # The loss is fp32 whatever the logits are.
    assert_close_to_reference(loss, expected, torch.float32)
    assert_close_to_reference(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(implementation, device, name, reduction):
    for dtype in dtypes_of(device):
        logits, labels = make((11, 131), device, dtype)
        options = dict(OPTIONS[name])
        if options.get("class_weights") == "random":
            options["class_weights"] = torch.rand(131, device=device) + 0.1
        check(logits, labels, dtype, reduction, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation, device, shape):
    for dtype in dtypes_of(device):
        logits, labels = make(shape, device, dtype)
        check(logits, labels, dtype)


def test_wide_row_crosses_blocks(implementation, device):
    for dtype in dtypes_of(device):
        logits, labels = make((3, 49153), device, dtype, ignore=False)
        labels[0], labels[1] = 49152, 0
        check(logits, labels, dtype)


def test_strided_logits(implementation, device):
    base, labels = make((13, 60), device, torch.float32)
    for view in (base[:, 5:50], base.detach().t().contiguous().t().requires_grad_()):
        view_labels = labels.clamp(max=40)
        loss = cross_entropy(view, view_labels)
        expected = F.cross_entropy(view.double(), view_labels)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        ours, theirs = (torch.autograd.grad(each, view)[0] for each in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_masked_logits(implementation, device):
    """Columns of -inf, as constrained vocabularies make them, even through a whole block."""
    logits, labels = make((4, 90), device, torch.float32, ignore=False)
    masked = logits.detach().clone()
    masked[:, :64] = float("-inf")
    masked.requires_grad_()
    check(masked, labels % 26 + 64, torch.float32)


def test_all_ignored(implementation, device):
    logits, labels = make((4, 9), device, torch.float32)
    labels.fill_(-100)
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits, labels, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_give_nan(implementation, device, value):
    logits, labels = make((4, 9), device, torch.float32, ignore=False)
    with torch.no_grad():
        logits[1, 3] = value
    assert cross_entropy(logits, labels).isnan()
    assert F.cross_entropy(logits, labels).isnan()


def test_outputs(implementation, device):
    logits, labels = make((3, 9, 13), device, torch.float32)
    out = cross_entropy(
        logits, labels, z_loss=1e-3, outputs=("token_loss", "token_accuracy", "predicted_tokens", "z_loss")
    )
    valid = labels != -100
    predicted = logits.argmax(-1)
    assert torch.equal(out.predicted_tokens, predicted.where(valid, -1))
    torch.testing.assert_close(out.token_accuracy, (predicted == labels)[valid].float().mean())
    torch.testing.assert_close(out.z_loss, 1e-3 * logits.logsumexp(-1)[valid].square().mean())
    torch.testing.assert_close(out.token_loss.sum() / valid.sum(), out.loss)
    for extra in out[1:]:
        assert not extra.requires_grad
    assert out.loss.requires_grad


def test_double_backward_raises(implementation, device):
    logits, labels = make((4, 9), device, torch.float32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy(logits, labels), logits, create_graph=True)


def test_gradcheck():
    logits, labels = make((5, 7), "cpu", torch.float64)
    torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, softcap=4.0, label_smoothing=0.1, z_loss=1e-2), logits)


def test_compiles_without_breaks_or_recompilation(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: cross_entropy(x * 2, y), fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for n in (5, 8, 16):
        logits, labels = make((n, 33), device, torch.float32)
        loss, expected = compiled(logits, labels), F.cross_entropy(logits * 2, labels)
        torch.testing.assert_close(loss, expected)
        ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (loss, expected))
        torch.testing.assert_close(ours, theirs)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_inputs_are_not_written(implementation, device):
    logits, labels = make((4, 9), device, torch.float32)
    before, labels_before = logits.detach().clone(), labels.clone()
    cross_entropy(logits, labels).backward()
    assert torch.equal(logits, before)
    assert torch.equal(labels, labels_before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(9,\)"),
        ({"outputs": ("logits",)}, ValueError, "outputs must be among"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, "labels must have logits' shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be integers"),
        ({"labels": torch.tensor([0, 9, 1, 2])}, ValueError, r"labels must lie in \[0, 9\).*first of them is 9"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, ValueError, "first of them is -1"),
        ({"logits": torch.ones(4, 9, dtype=torch.long)}, TypeError, "logits must have a floating point dtype"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.randn(4, 9), "labels": torch.zeros(4, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)
