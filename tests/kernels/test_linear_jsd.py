"""linear_jsd against float64 logits and TRL's own loss, forward and every gradient, over three tiles and more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from wide_tensors import wide_tensors

from liger_trainer.kernels import linear_jsd

from .divergence_reference import reference_divergence
from .helpers import dtypes_of
from .loss_reference import assert_product_close

N, HS, HT, V = 22, 24, 16, 131
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "transforms": {
        "student_softcap": 3.0,
        "student_logit_scale": 1.7,
        "teacher_softcap": 2.0,
        "teacher_logit_scale": 0.6,
        "temperature": 0.8,
    },
    "biases": {"student_bias": True, "teacher_bias": True},
    "token_weights": {"token_weights": True},
    "num_items": {"num_items": 7},
}


def make(device, dtype, n=N, hs=HS, ht=HT, v=V):
    torch.manual_seed(n + hs + v)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype)

    student = normal(n, hs).requires_grad_(), normal(v, hs, scale=hs**-0.5).requires_grad_()
    labels = torch.randint(v, (n,)).to(device)
    labels[::3] = -100
    return *student, normal(n, ht), normal(v, ht, scale=ht**-0.5), labels


def check(tensors, dtype, *, tile_rows=3, labels=None, student_bias=None, teacher_bias=None, **options):
    student_hidden, student_weight, teacher_hidden, teacher_weight = tensors
    loss = linear_jsd(
        *tensors,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        tile_bytes=2 * tile_rows * len(student_weight) * dtype.itemsize,
        **options,
    )
    leaves = [each for each in (student_hidden, student_weight, student_bias) if each is not None]
    exact = [each.detach().double().cpu().requires_grad_(each.requires_grad) for each in leaves]
    logits = [
        F.linear(*exact),
        F.linear(*(each.double().cpu() for each in (teacher_hidden, teacher_weight, teacher_bias) if each is not None)),
    ]
    logits = [each + (each.to(dtype) - each).detach() for each in logits]  # rounded as linear layers round them
    options = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = reference_divergence(*logits, labels=None if labels is None else labels.cpu(), **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0))
    wrt = [(ours, theirs) for ours, theirs in zip(leaves, exact, strict=True) if ours.requires_grad]
    ours, theirs = zip(*wrt, strict=True)
    gradients = torch.autograd.grad(loss, ours, upstream.to(loss.device))
    assert_product_close(loss, expected, dtype)
    for gradient, exact_gradient in zip(
        gradients, torch.autograd.grad(expected, theirs, upstream.double()), strict=True
    ):
        assert gradient.dtype == dtype
        assert_product_close(gradient, exact_gradient, dtype)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(implementation, device, name, beta):
    for dtype in dtypes_of(device):
        *tensors, labels = make(device, dtype)
        options = dict(OPTIONS[name])
        if "token_weights" in options:
            options["token_weights"] = torch.rand(N, device=device) + 0.1
        if "student_bias" in options:
            options["student_bias"] = torch.randn(V).to(device, dtype).requires_grad_()
            options["teacher_bias"] = torch.randn(V).to(device, dtype)
        check(tensors, dtype, labels=labels, beta=beta, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(implementation, device, reduction, frozen, weighted):
    for dtype in dtypes_of(device):
        *tensors, labels = make(device, dtype)
        tensors = [each.detach() if i in frozen else each for i, each in enumerate(tensors)]
        options = {"token_weights": torch.rand(N, device=device) + 0.1} if weighted else {}
        check(tensors, dtype, labels=labels, reduction=reduction, **options)


@pytest.mark.parametrize(("n", "hs", "ht", "v"), [(1, 8, 3, 5), (2, 1, 9, 9), (7, 13, 5, 40003), (5, 16, 8, 1)])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_shapes(implementation, device, n, hs, ht, v, beta):
    *tensors, _ = make(device, torch.float32, n, hs, ht, v)
    check(tensors, torch.float32, beta=beta)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_rows_that_one_head_lacks_take_no_part(implementation, device, padded):
    hidden, weight, teacher_hidden, teacher_weight, labels = make(device, torch.float32)
    expected = linear_jsd(hidden, weight, teacher_hidden, teacher_weight, labels=labels)
    longer = {"student": weight, "teacher": teacher_weight}
    extra = torch.randn(5, longer[padded].shape[1], device=device)
    longer[padded] = torch.cat([longer[padded], extra]).detach().requires_grad_()
    loss = linear_jsd(hidden, longer["student"], teacher_hidden, longer["teacher"], labels=labels)
    assert torch.equal(loss, expected)
    ours = torch.autograd.grad(loss, (hidden, longer["student"]))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1][:V], theirs[1])
    assert not ours[1][V:].any()


def test_a_teacher_equal_to_the_student_teaches_nothing(implementation, device):
    hidden, weight, *_ = make(device, torch.float32)
    for beta in (0, 0.5, 1):
        loss = linear_jsd(hidden, weight, hidden, weight, beta=beta)
        assert loss.abs() < 1e-6
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_classes_of_logit_minus_infinity_have_no_part(implementation, device, beta):
    hidden, weight, teacher_hidden, teacher_weight, labels = make(device, torch.float32)
    bias = torch.zeros(V, device=device)
    bias[100:] = float("-inf")
    loss = linear_jsd(
        hidden, weight, teacher_hidden, teacher_weight, labels=labels, beta=beta, student_bias=bias, teacher_bias=bias
    )
    expected = linear_jsd(hidden, weight[:100], teacher_hidden, teacher_weight[:100], labels=labels, beta=beta)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_far_apart_distributions_stay_finite(implementation, device):
    hidden = torch.eye(4, 8, device=device).mul(300).requires_grad_()
    weight = torch.eye(8, device=device).requires_grad_()
    teacher = hidden.detach().roll(1, 1)
    for beta in (0.1, 0.5, 0.9):
        loss = linear_jsd(hidden, weight, teacher, weight, beta=beta)
        expected = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
        torch.testing.assert_close(loss.cpu(), expected)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_no_tensor_of_the_logits_size(implementation, device):
    *tensors, labels = make(device, torch.float32, n=40)

    def step(reduction, tile_rows):
        with wide_tensors(V, rows=5, hidden_size=HS) as found:
            loss = linear_jsd(*tensors, labels=labels, reduction=reduction, tile_bytes=2 * tile_rows * V * 4)
            loss.sum().backward()
        return [each for each in found if each[1] != (HT, V)]

    assert not step("mean", 5)
    assert not step("none", 5)
    assert step("mean", 6)


def test_bound_too_small_is_nan_and_none_to_teach_is_zero(implementation, device):
    *tensors, labels = make(device, torch.float32)
    assert linear_jsd(*tensors, labels=labels, max_valid=13).isnan()
    assert linear_jsd(*tensors, labels=labels, max_valid=13, reduction="none").isnan().all()
    loss = linear_jsd(*tensors, labels=torch.full_like(labels, -100))
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors[:2]))


def test_teacher_of_another_dtype(device):
    hidden, weight, teacher_hidden, teacher_weight, labels = make(device, torch.float32)
    half = teacher_hidden.bfloat16(), teacher_weight.bfloat16()
    loss = linear_jsd(hidden, weight, *half, labels=labels)
    logits = F.linear(*half).float()
    expected = reference_divergence(F.linear(hidden, weight).double(), logits.double(), labels=labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_outputs(implementation, device, reduction):
    *tensors, labels = make(device, torch.float32)
    out = linear_jsd(
        *tensors, labels=labels, temperature=0.8, reduction=reduction, tile_bytes=6 * V * 4,
        outputs=("token_loss", "student_entropy"),
    )  # fmt: skip
    log_p = (F.linear(*tensors[:2]) / 0.8).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(out.student_entropy, entropy.detach().where(labels != -100, 0))
    torch.testing.assert_close(out.token_loss, linear_jsd(*tensors, labels=labels, temperature=0.8, reduction="none"))
    assert out.loss.requires_grad and not out.token_loss.requires_grad and not out.student_entropy.requires_grad
    plain = linear_jsd(*tensors, labels=labels, temperature=0.8, reduction=reduction, tile_bytes=6 * V * 4)
    for one, two in zip(
        torch.autograd.grad(out.loss.sum(), tensors[:2]), torch.autograd.grad(plain.sum(), tensors[:2]), strict=True
    ):
        assert torch.equal(one, two)


def test_loss_of_gkd(device):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    hidden, weight, teacher_hidden, teacher_weight, labels = make(device, torch.float32)
    for beta in (0, 0.3, 1):
        for num_items in (None, 9):
            loss = linear_jsd(
                hidden, weight, teacher_hidden, teacher_weight, labels=labels, beta=beta, temperature=0.9,
                num_items=num_items,
            )  # fmt: skip
            expected = gkd.GKDTrainer.generalized_jsd_loss(
                F.linear(hidden, weight),
                F.linear(teacher_hidden, teacher_weight),
                labels,
                beta,
                0.9,
                num_items_in_batch=num_items,
            )
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(
                *(torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_errors_name_the_argument(device):
    hidden, weight, teacher_hidden, teacher_weight, labels = make(device, torch.float32)
    wrong = [
        (ValueError, r"beta must lie in \[0, 1\]", {"beta": 1.5}),
        (ValueError, "temperature must be above 0", {"temperature": 0.0}),
        (ValueError, r"student_weight must have shape \(V, 24\)", {"student_weight": weight[:, :5]}),
        (ValueError, r"teacher_weight must have shape \(V, 16\)", {"teacher_weight": weight}),
        (ValueError, "teacher_hidden must have student_hidden's shape", {"teacher_hidden": teacher_hidden[1:]}),
        (ValueError, "labels must have hidden's shape", {"labels": labels[1:]}),
        (ValueError, "teacher_bias must have shape", {"teacher_bias": weight[:5, 0]}),
        (ValueError, "reduction must be one of", {"reduction": "batchmean"}),
        (ValueError, "num_items divides the sum", {"reduction": "sum", "num_items": 3}),
        (ValueError, "token_weights must have shape", {"token_weights": weight}),
        (ValueError, "tile_bytes must be above 0", {"tile_bytes": 0}),
        (ValueError, "outputs must be among", {"outputs": ("entropy",)}),
        (TypeError, "student_weight must|weight must have hidden's dtype", {"student_weight": weight.bfloat16()}),
    ]
    arguments = {
        "student_hidden": hidden,
        "student_weight": weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    for error, message, changed in wrong:
        with pytest.raises(error, match=message):
            linear_jsd(**{**arguments, **changed})
