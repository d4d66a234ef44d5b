"""jsd and kl_div against float64 and PyTorch's own, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.kernels import jsd, kl_div

from .divergence_reference import reference_divergence
from .helpers import assert_close_to_reference, dtypes_of, rounded


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_jsd(implementation, device, beta, reduction):
    for dtype in dtypes_of(device):
        for shape in ((2, 3, 17), (1, 20011)):
            student, teacher = (rounded(*shape, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
            labels = torch.zeros(shape[:-1], dtype=torch.long, device=device)
            labels.view(-1)[1::2] = -100
            loss = jsd(student, teacher, beta=beta, temperature=1.3, labels=labels, reduction=reduction)
            exact = student.detach().double().cpu().requires_grad_()
            expected = reference_divergence(
                exact,
                teacher.detach().double().cpu(),
                beta=beta,
                temperature=1.3,
                labels=labels.cpu(),
                reduction=reduction,
            )
            upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0))
            (gradient,) = torch.autograd.grad(loss, student, upstream.to(device))
            (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
            assert_close_to_reference(loss, expected, torch.float32, magnitude=20.0)
            assert_close_to_reference(gradient, expected_gradient, dtype)


def test_jsd_num_items(device):
    student, teacher = (rounded(4, 9, device=device, dtype=torch.float32, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(jsd(student, teacher, num_items=7), jsd(student, teacher, reduction="sum") / 7)


def test_jsd_of_log_probabilities_is_that_of_logits(implementation, device):
    student, teacher = (rounded(4, 9, device=device, dtype=torch.float32, seed=seed) for seed in (0, 1))
    results = []
    for make in (torch.Tensor.clone, lambda x: x.log_softmax(-1)):
        loss = jsd(make(student), make(teacher), beta=0.2)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_kl_div(implementation, device, reduction, log_target):
    for dtype in dtypes_of(device):
        for shape in ((2, 3, 17), (3, 20011)):
            log_q = rounded(*shape, device=device, dtype=torch.float32).detach().log_softmax(-1)
            log_q = log_q.to(dtype).requires_grad_()
            target = rounded(*shape, device=device, dtype=torch.float32, seed=1).detach()
            target = (target.log_softmax(-1) if log_target else target.softmax(-1)).to(dtype)
            if not log_target:
                target[..., 3] = 0
            loss = kl_div(log_q, target, reduction=reduction, log_target=log_target)
            exact = log_q.detach().double().cpu().requires_grad_()
            expected = F.kl_div(exact, target.double().cpu(), reduction=reduction, log_target=log_target)
            assert_close_to_reference(loss, expected, torch.float32, magnitude=20.0)
            (gradient,) = torch.autograd.grad(loss.sum(), log_q)
            (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
            assert_close_to_reference(gradient, expected_gradient, dtype)


def test_terms_of_kl_div_are_pytorchs(device):
    log_q = rounded(3, 17, device=device, dtype=torch.float32).detach().log_softmax(-1)
    assert torch.equal(kl_div(log_q, log_q.exp(), reduction="none"), F.kl_div(log_q, log_q.exp(), reduction="none"))


def test_errors_name_the_argument(device):
    student = rounded(4, 9, device=device, dtype=torch.float32)
    wrong = [
        (jsd, ValueError, "teacher_logits must have student_logits' shape", (student, student[1:]), {}),
        (jsd, ValueError, r"beta must lie in \[0, 1\]", (student, student), {"beta": -0.1}),
        (jsd, TypeError, "teacher_logits must have a floating point dtype", (student, student.long()), {}),
        (
            jsd,
            ValueError,
            "labels must have the logits' shape",
            (student, student),
            {"labels": student[:, 0].long()[1:]},
        ),
        (jsd, ValueError, "reduction must be one of", (student, student), {"reduction": "batchmean"}),
        (kl_div, ValueError, "target must have input's shape", (student, student[1:]), {}),
        (kl_div, ValueError, "reduction must be one of", (student, student), {"reduction": "median"}),
    ]
    for function, error, message, tensors, options in wrong:
        with pytest.raises(error, match=message):
            function(*tensors, **options)
