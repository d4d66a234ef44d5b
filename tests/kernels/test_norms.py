"""rms_norm and layer_norm against float64, forward and every gradient, both implementations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.kernels import _norm_kernels, layer_norm, rms_norm

from .helpers import ON_GPU, RecordOutputs, assert_close_to_reference, doubled, dtypes_of, rounded, strided_views

SHAPES = [(1, 64), (5, 1), (1, 1), (3, 9, 13), (130, 7), (5, 1100), (3, 9000), (0, 17), (2, 0, 5), (3, 0), (64,)]
if ON_GPU:
    SHAPES += [(8192, 128), (1000, 4096), (517, 5120), (70, 8192), (33, 16384), (9, 20000), (5, 33000), (3, 100003)]
EPS = 1e-5


def rms_reference(x, weight, bias=None, *, offset=0.0):
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y if weight is None else y * (offset + weight)


def layer_reference(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def magnitudes(x, weight, dy, offset, centered):
    """Sizes of the terms of dx, dweight and dbias: dx is a difference of g and its projections, the others are sums."""
    mean = x.mean(-1, keepdim=True) if centered else 0.0
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    normalized = ((x.abs() + abs(mean)) * rstd).abs()
    g = dy.abs() if weight is None else dy.abs() * (offset + weight).abs()
    dx = rstd * (g + normalized * (g * normalized).mean(-1, keepdim=True) + g.mean(-1, keepdim=True))
    rows = (dy.abs() * normalized).reshape(-1, x.shape[-1]) if x.numel() else torch.zeros(1, x.shape[-1])
    return dx, rows.sum(0), dy.abs().sum(tuple(range(x.dim() - 1)))


def check(x, weight, bias, *, offset=0.0, casting=None):
    """Compare everything that the op gives on these tensors; casting None means layer_norm."""
    leaves = [tensor for tensor in (x, weight, bias) if tensor is not None]
    before = [leaf.detach().clone() for leaf in leaves]
    exact_x, exact_weight, exact_bias = (doubled(tensor) for tensor in (x, weight, bias))
    exact_leaves = [tensor for tensor in (exact_x, exact_weight, exact_bias) if tensor is not None]
    if casting is None:
        y = layer_norm(x, weight, bias, EPS)
        expected = layer_reference(exact_x, exact_weight, exact_bias)
    else:
        y = rms_norm(x, weight, EPS, offset=offset, casting=casting)
        expected = rms_reference(exact_x, exact_weight, offset=offset)
    # bias + scaled row may cancel; so may x - mean, by up to the largest element of the row
    assert_close_to_reference(y, expected, y.dtype)
    dy = rounded(*y.shape, device=y.device, dtype=y.dtype, seed=7).detach()
    sizes = magnitudes(
        exact_x.detach(), None if weight is None else exact_weight.detach(), dy.double().cpu(), offset, casting is None
    )
    gradients = torch.autograd.grad(y, leaves, dy)
    expected_gradients = torch.autograd.grad(expected, exact_leaves, dy.double().cpu())
    used = [size for size, tensor in zip(sizes, (x, weight, bias), strict=True) if tensor is not None]
    for leaf, gradient, reference, size in zip(leaves, gradients, expected_gradients, used, strict=True):
        assert gradient.dtype == leaf.dtype
        if leaf is not x and casting == "llama" and leaf.dtype != torch.float64:
            # "llama" rounds the normalised row to x's dtype, and so does the gradient: half an ulp of every term
            size = size * max(1.0, torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps / 16)
        assert_close_to_reference(gradient, reference, leaf.dtype, magnitude=size)
    for leaf, copy in zip(leaves, before, strict=True):
        assert torch.equal(leaf, copy)


OPS = {
    "rms_llama": {"casting": "llama"},
    "rms_gemma": {"casting": "gemma", "offset": 1.0},
    "rms_none": {"casting": "none"},
    "layer": {},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes_and_dtypes(implementation, device, op, shape):
    for dtype in dtypes_of(device):
        make = partial(rounded, device=device, dtype=dtype)
        check(make(*shape), make(shape[-1], seed=1), make(shape[-1], seed=2) if op == "layer" else None, **OPS[op])


@pytest.mark.parametrize("op", OPS)
def test_rows_wider_than_registers(implementation, device, op, monkeypatch):
    """The loops over blocks, by making a tile small instead of a row wide."""
    monkeypatch.setattr(_norm_kernels, "_tile", lambda width, limit: (32, 1, 1))
    make = partial(rounded, device=device, dtype=torch.float32)
    check(make(3, 2, 75), make(75, seed=1), make(75, seed=2) if op == "layer" else None, **OPS[op])
    check(make(5, 64), None, None, **OPS[op])


@pytest.mark.parametrize("name", strided_views(torch.empty))
@pytest.mark.parametrize("op", ["rms_llama", "layer"])
def test_strided_inputs(implementation, device, op, name):
    make = partial(rounded, device=device, dtype=torch.float32)
    x = strided_views(make)[name]
    check(x, make(8, seed=1), make(8, seed=2) if op == "layer" else None, **OPS[op])
    check(x, make(16, seed=1)[::2], None, **OPS[op])


@pytest.mark.parametrize("op", ["rms_llama", "layer"])
def test_memory_order_is_kept(implementation, device, op):
    x = rounded(2, 5, 3, 8, device=device, dtype=torch.float32).detach().transpose(1, 2).requires_grad_()
    weight = torch.ones(8, device=device)
    y = rms_norm(x, weight) if op == "rms_llama" else layer_norm(x, weight)
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, torch.ones(2, 3, 5, 8, device=device).contiguous())
    assert dx.stride() == x.stride()
    (dx,) = torch.autograd.grad(y.new_zeros(()) + (rms_norm(x, weight)).sum(), x)  # an expanded gradient
    assert dx.shape == x.shape


@pytest.mark.parametrize("op", ["rms_llama", "layer"])
def test_result_is_dense_rows_whatever_the_columns_stride(implementation, device, op):
    """What the fake implementation promises the compiler, for a matrix that is transposed in memory."""
    x = rounded(8, 5, device=device, dtype=torch.float32).detach().t().requires_grad_()
    weight = torch.ones(8, device=device)
    y = rms_norm(x, weight) if op == "rms_llama" else layer_norm(x, weight)
    with RecordOutputs("backward") as record:
        torch.autograd.grad(y, x, torch.ones(8, 5, device=device).t())
    assert y.is_contiguous()
    assert record.outputs[0][0].is_contiguous()


@pytest.mark.parametrize("tiles_of_one_program", [0, 1000])
@pytest.mark.parametrize("op", OPS)
def test_sums_of_one_program_and_of_several(implementation, device, op, tiles_of_one_program, monkeypatch):
    """The gradients of the weight and the bias, through partial sums and without."""
    monkeypatch.setattr(_norm_kernels, "_TILES_OF_ONE_PROGRAM", tiles_of_one_program)
    make = partial(rounded, device=device, dtype=torch.float32)
    for shape, tile in (((40, 24), (32, 2, 1)), ((7, 75), (32, 1, 1))):  # rows in registers, wide rows
        monkeypatch.setattr(_norm_kernels, "_tile", lambda width, limit, tile=tile: tile)
        bias = make(shape[-1], seed=2) if op == "layer" else None
        check(make(*shape), make(shape[-1], seed=1), bias, **OPS[op])
    if op == "layer":
        for frozen in (1, 2):
            vectors = [make(75, seed=seed).detach().requires_grad_(seed != frozen) for seed in (1, 2)]
            x = make(7, 75)
            dy = make(7, 75, seed=3).detach()
            wanted = [vector for vector in vectors if vector.requires_grad]
            (gradient,) = torch.autograd.grad(layer_norm(x, *vectors, EPS), wanted, dy)
            (expected,) = torch.autograd.grad(F.layer_norm(x, (75,), *vectors, EPS), wanted, dy)
            torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("op", OPS)
def test_without_weight(implementation, device, op):
    for dtype in dtypes_of(device):
        make = partial(rounded, device=device, dtype=dtype)
        check(make(6, 40), None, make(40, seed=2) if op == "layer" else None, **OPS[op])


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_the_result(implementation, device, x_dtype, weight_dtype):
    """What the models' own formulas give for this pair of dtypes."""
    x, weight = torch.randn(2, 8, device=device, dtype=x_dtype), torch.ones(8, device=device, dtype=weight_dtype)
    assert rms_norm(x, weight, casting="llama").dtype == (weight * x).dtype
    assert rms_norm(x, weight, casting="gemma").dtype == x_dtype
    assert rms_norm(x, weight, casting="none").dtype == F.rms_norm(x, (8,), weight).dtype
    assert layer_norm(x, weight, weight).dtype == x_dtype
    for casting in ("llama", "gemma", "none"):
        assert rms_norm(x, None, casting=casting).dtype == x_dtype
    x.requires_grad_()
    weight.requires_grad_()
    for y in (rms_norm(x, weight), layer_norm(x, weight, weight)):
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert (dx.dtype, dweight.dtype) == (x_dtype, weight_dtype)


@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_rounds_where_the_model_rounds(implementation, device, casting):
    """Bit for bit the model's formula, up to the rare tie that another order of the mean's sum tips over."""
    x = rounded(64, 48, device=device, dtype=torch.float16).detach()
    weight = rounded(48, device=device, dtype=torch.float16, seed=1).detach()

    def llama(offset):
        n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        return (offset + weight) * n.to(x.dtype)

    def gemma(offset):
        n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        return (n * (offset + weight.float())).to(x.dtype)

    for offset in (0.0, 1.0):
        y = rms_norm(x, weight, EPS, offset=offset, casting=casting)
        same, other = (llama, gemma) if casting == "llama" else (gemma, llama)
        assert (y != same(offset)).float().mean() < 0.02
        assert (y != other(offset)).float().mean() > 0.1


def test_weight_in_fp32_with_a_half_precision_row(implementation, device):
    for dtype in dtypes_of(device):
        x = rounded(7, 24, device=device, dtype=dtype)
        weight, bias = (rounded(24, device=device, dtype=torch.float32, seed=seed) for seed in (1, 2))
        check(x, weight, bias)
        check(x, weight, None, casting="gemma", offset=1.0)


@pytest.mark.skipif(not ON_GPU, reason="the CPU's autocast leaves the norms alone")
def test_autocast_on_a_gpu():
    x, weight = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16), torch.randn(8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for ours, theirs in (
            (layer_norm(x, weight, weight), F.layer_norm(x, (8,), weight, weight)),
            (rms_norm(x, weight, 1e-6, casting="none"), F.rms_norm(x, (8,), weight, 1e-6)),
        ):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


def test_autocast_on_the_cpu():
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm(x, weight, weight).dtype == F.layer_norm(x, (8,), weight, weight).dtype
        assert rms_norm(x, weight).dtype == torch.float32
        assert rms_norm(x, weight, casting="none").dtype == F.rms_norm(x, (8,), weight).dtype


def test_only_wanted_gradients_are_computed(implementation, device):
    x = rounded(6, 8, device=device, dtype=torch.float32)
    weight = torch.ones(8, device=device)
    with RecordOutputs("backward") as record:
        torch.autograd.grad(rms_norm(x, weight).sum(), x)
        torch.autograd.grad(layer_norm(x, weight, weight.clone().requires_grad_()).sum(), x)
    shapes = [[None if tensor is None else tuple(tensor.shape) for tensor in outputs] for outputs in record.outputs]
    assert shapes == [[(6, 8), None], [(6, 8), None, (8,)]]


@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_gradcheck_rms_norm(casting):
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64).transpose(1, 2).requires_grad_()
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, offset=1.0, casting=casting), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, casting=casting), (x,))


def test_gradcheck_layer_norm():
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64).transpose(1, 2).requires_grad_()
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, None, None), (x,))


def test_float64_stays_float64(implementation, device):
    x, weight = (torch.randn(*shape, device=device, dtype=torch.float64) for shape in ((3, 11), (11,)))
    exact = rms_reference(x, weight)
    assert_close_to_reference(rms_norm(x, weight, EPS), exact, torch.float64)
    assert_close_to_reference(layer_norm(x, weight, weight, EPS), layer_reference(x, weight, weight), torch.float64)


@pytest.mark.parametrize("op", [rms_norm, layer_norm])
def test_nonfinite_rows_stay_to_themselves(implementation, device, op):
    x = torch.randn(3, 10, device=device)
    x[1, 4] = float("inf")
    y = op(x, torch.ones(10, device=device))
    assert y[1].isnan().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("op", [rms_norm, layer_norm])
def test_double_backward_raises(op):
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no second derivative"):
        torch.autograd.grad(op(x, torch.ones(4)).sum(), x, create_graph=True)


@pytest.mark.parametrize("op", [rms_norm, layer_norm])
def test_bad_inputs(op):
    x, weight = torch.randn(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\).*got \(3,\)"):
        op(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\).*got \(1, 4\)"):
        op(x, torch.ones(1, 4))
    with pytest.raises(TypeError, match="x must have a floating point dtype, got torch.int64"):
        op(x.long(), weight)
    with pytest.raises(TypeError, match="weight must have a floating point dtype"):
        op(x, weight.long())
    with pytest.raises(ValueError, match="weight is on meta"):
        op(x, weight.to("meta"))
    with pytest.raises(ValueError, match="at least one dimension"):
        op(torch.tensor(1.0), weight)


def test_bad_options():
    x, weight = torch.randn(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"casting must be one of .* got 'lama'"):
        rms_norm(x, weight, casting="lama")
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        layer_norm(x, weight, torch.ones(5))
