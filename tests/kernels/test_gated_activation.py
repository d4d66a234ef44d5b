"""swiglu and geglu against float64, forward and both gradients, both implementations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.kernels import geglu, swiglu

from .helpers import ON_GPU, assert_close_to_reference, doubled, dtypes_of, rounded, strided_views

SHAPES = [(1, 64), (5, 1), (1, 1), (3, 9, 13), (130, 7), (3, 2100), (0, 17), (2, 0, 5), (3, 0), (19,)]
if ON_GPU:
    SHAPES += [(1000, 14336), (517, 11008), (3, 100003), (100003, 3)]

OPS = {
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu_tanh": (geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "geglu_exact": (partial(geglu, approximate="none"), lambda gate, up: F.gelu(gate) * up),
}


def check(name, gate, up):
    op, reference = OPS[name]
    before = gate.detach().clone(), up.detach().clone()
    y = op(gate, up)
    assert y.dtype == torch.promote_types(gate.dtype, up.dtype)
    exact = doubled(gate), doubled(up)
    expected = reference(*exact)
    dy = rounded(*y.shape, device=y.device, dtype=y.dtype, seed=7).detach()
    exact_dy = dy.double().cpu()
    gradients = torch.autograd.grad(y, (gate, up), dy)
    expected_gradients = torch.autograd.grad(expected, exact, exact_dy)
    # Every factor has a relative error of a few ulp, but act(gate) = gate * sigmoid cancels where sigmoid is near 0.
    exact_gate, exact_up = (tensor.detach() for tensor in exact)
    assert_close_to_reference(y, expected, y.dtype, magnitude=(exact_gate * exact_up).abs())
    sizes = (exact_dy * exact_up).abs() * (1 + exact_gate.abs()), (exact_dy * exact_gate).abs()
    for gradient, exact_gradient, leaf, size in zip(gradients, expected_gradients, (gate, up), sizes, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close_to_reference(gradient, exact_gradient, leaf.dtype, magnitude=size)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_shapes_and_dtypes(implementation, device, name, shape):
    for dtype in dtypes_of(device):
        check(name, rounded(*shape, device=device, dtype=dtype), rounded(*shape, device=device, dtype=dtype, seed=1))


@pytest.mark.parametrize("view", strided_views(torch.empty))
def test_strided_inputs(implementation, device, view):
    gate = strided_views(partial(rounded, device=device, dtype=torch.float32))[view]
    up = strided_views(partial(rounded, device=device, dtype=torch.float32, seed=1))[view]
    dense = rounded(2, 3, 5, 8, device=device, dtype=torch.float32, seed=2)
    for pair in ((gate, up), (gate, dense), (dense, up)):
        check("swiglu", *pair)


def test_halves_of_a_fused_projection(implementation, device):
    for name in OPS:
        fused = rounded(2, 5, 26, device=device, dtype=torch.float32)
        gate, up = fused.chunk(2, dim=-1)
        check(name, gate, up)
        (gradient,) = torch.autograd.grad(OPS[name][0](gate, up).sum(), fused)
        exact = doubled(fused)
        (expected,) = torch.autograd.grad(OPS[name][1](*exact.chunk(2, dim=-1)).sum(), exact)
        assert_close_to_reference(gradient, expected, torch.float32)


def test_memory_order_is_kept(implementation, device):
    gate, up = (torch.randn(2, 5, 3, 8, device=device).transpose(1, 2).requires_grad_() for _ in range(2))
    y = swiglu(gate, up)
    gradients = torch.autograd.grad(y, (gate, up), torch.ones(2, 3, 5, 8, device=device))
    for tensor in (y, *gradients):
        assert tensor.stride() == gate.stride()


@pytest.mark.parametrize("name", OPS)
def test_saturated_gates(implementation, device, name):
    """Far out the activation is 0 or the identity, with slope 0 or 1, and nothing overflows on the way."""
    op, _ = OPS[name]
    gate = torch.tensor([-1e10, -3e4, -200.0, 0.0, 200.0, 3e4, 1e10], device=device, requires_grad=True)
    y = op(gate, torch.ones_like(gate))
    (slope,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(y, gate.clamp(min=0))
    torch.testing.assert_close(slope, torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1], device=device))


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("up_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mixed_dtypes(implementation, device, gate_dtype, up_dtype):
    gate, up = (torch.randn(4, 8, device=device).to(dtype).requires_grad_() for dtype in (gate_dtype, up_dtype))
    y = swiglu(gate, up)
    assert y.dtype == (F.silu(gate) * up).dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (gate, up))] == [gate_dtype, up_dtype]


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    gate, up = (torch.randn(2, 5, 3, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(OPS[name][0], (gate, up))


def test_float64_stays_float64(implementation, device):
    gate, up = (torch.randn(3, 7, device=device, dtype=torch.float64) for _ in range(2))
    for op, reference in OPS.values():
        assert_close_to_reference(op(gate, up), reference(gate, up), torch.float64)


@pytest.mark.parametrize("name", OPS)
def test_double_backward_raises(name):
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name[:6].rstrip('_')} has no second derivative"):
        torch.autograd.grad(OPS[name][0](x, x).sum(), x, create_graph=True)


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_bad_inputs(op):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"same shape, got \(3, 4\) and \(3, 1\)"):
        op(x, x[:, :1])
    with pytest.raises(TypeError, match="up must have a floating point dtype, got torch.int32"):
        op(x, x.int())
    with pytest.raises(ValueError, match="up is on meta"):
        op(x, x.to("meta"))
    with pytest.raises(ValueError, match="at least one dimension"):
        op(torch.tensor(1.0), torch.tensor(1.0))


def test_unknown_approximation():
    with pytest.raises(ValueError, match=r"approximate must be one of .* got 'sigmoid'"):
        geglu(torch.ones(2), torch.ones(2), approximate="sigmoid")
