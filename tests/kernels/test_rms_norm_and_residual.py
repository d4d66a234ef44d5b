"""rms_norm_and_residual against rms_norm and a second use of its input, both implementations."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from liger_trainer.kernels import rms_norm, rms_norm_and_residual

from .helpers import RecordOutputs, assert_close_to_reference, dtypes_of, rounded, strided_views
from .test_add_rms_norm import CASTINGS
from .test_norms import EPS, SHAPES, magnitudes, rms_reference


def reference(x, weight, dy, dresidual, offset):
    """The gradients of x and weight in float64, and what an error in them is measured against."""
    x, weight = (None if t is None else t.detach().double().requires_grad_() for t in (x, weight))
    dy, dresidual = dy.double(), dresidual.double()
    leaves = [t for t in (x, weight) if t is not None]
    exact = torch.autograd.grad((rms_reference(x, weight, offset=offset), x * 1), leaves, (dy, dresidual))
    dx, dweight, _ = magnitudes(x.detach(), None if weight is None else weight.detach(), dy, offset, False)
    return zip(exact, (dx + dresidual.abs(), dweight), strict=False)


def check(x, weight, *, casting="llama", offset=0.0):
    y, residual = rms_norm_and_residual(x, weight, EPS, casting=casting, offset=offset)
    assert torch.equal(y, rms_norm(x, weight, EPS, casting=casting, offset=offset))
    assert torch.equal(residual, x)
    assert residual.data_ptr() == x.data_ptr()
    dy = rounded(*y.shape, device=y.device, dtype=y.dtype, seed=7).detach()
    dresidual = rounded(*y.shape, device=y.device, dtype=x.dtype, seed=8).detach()
    leaves = [t for t in (x, weight) if t is not None]
    with RecordOutputs("backward") as record:
        gradients = torch.autograd.grad((y, residual), leaves, (dy, dresidual))
    assert len(record.outputs) == 1  # one kernel, and its result is the gradient
    assert torch.equal(record.outputs[0][0], gradients[0])
    for leaf, gradient, (exact, size) in zip(
        leaves, gradients, reference(x, weight, dy, dresidual, offset), strict=True
    ):
        if leaf is weight and casting == "llama" and leaf.dtype != torch.float64:
            size = size * max(1.0, torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps / 16)
        assert_close_to_reference(gradient, exact, leaf.dtype, magnitude=size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("casting", "offset"), CASTINGS)
def test_shapes_and_dtypes(implementation, device, casting, offset, shape):
    for dtype in dtypes_of(device):
        make = partial(rounded, device=device, dtype=dtype)
        check(make(*shape), make(shape[-1], seed=1), casting=casting, offset=offset)
    check(make(*shape), None)


@pytest.mark.parametrize("name", strided_views(torch.empty))
def test_strided_inputs(implementation, device, name):
    make = partial(rounded, device=device, dtype=torch.float32)
    check(strided_views(make)[name], make(8, seed=1))


@pytest.mark.parametrize("used", ["y", "residual"])
def test_one_output_used(implementation, device, used):
    make = partial(rounded, device=device, dtype=torch.float32)
    x, weight, dy = make(5, 24), make(24, seed=1), make(5, 24, seed=7).detach()
    y, residual = rms_norm_and_residual(x, weight, EPS)
    gradients = torch.autograd.grad(y if used == "y" else residual, (x, weight), dy, allow_unused=True)
    if used == "y":
        expected = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), dy)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    else:
        assert torch.equal(gradients[0], dy) and gradients[1] is None


def test_gradients_added_to_on_their_way(implementation, device):
    """x is used again elsewhere, before and after; the graph runs twice."""
    results = []
    for fused in (True, False):
        leaf, weight = (rounded(*shape, device=device, dtype=torch.float32) for shape in ((5, 24), (24,)))
        x = leaf * 2
        before = (x * 5).sum()
        y, residual = rms_norm_and_residual(x, weight, EPS) if fused else (rms_norm(x, weight, EPS), x)
        loss = before + (y * y.detach().cos()).sum() + residual.square().sum() + (x * 11).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([leaf.grad, weight.grad])
    torch.testing.assert_close(*results)


def test_without_gradients_and_twice_differentiated(implementation, device):
    x, weight = rounded(5, 24, device=device, dtype=torch.float32), torch.ones(24, device=device)
    with torch.no_grad():
        y, residual = rms_norm_and_residual(x, weight)
    assert residual is x and not y.requires_grad
    y, residual = rms_norm_and_residual(x, weight)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum() + residual.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="casting"):
        rms_norm_and_residual(x, weight, casting="other")
