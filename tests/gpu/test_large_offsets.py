"""Tensors of more than 2^31 elements: the rows behind that offset are read and written as those before it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from liger_trainer.kernels import (
    add_rms_norm,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu,
)

from ..kernels.helpers import assert_close_to_reference
from ..kernels.loss_reference import assert_product_close
from ..kernels.test_rotary import reference as rotary_reference

LIMIT = 2**31
V = 128256
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    torch.cuda.empty_cache()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_(std=scale, generator=generator)


def labels_of(n: int, n_classes: int = V) -> Tensor:
    return torch.randint(n_classes, (n,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def rows_around_the_limit(n_rows: int, width: int) -> Tensor:
    """The first rows, those on both sides of element 2^31 and 2^32 / 2 - 1, and the last."""
    assert n_rows * width > LIMIT
    middle = LIMIT // width
    rows = [0, 1, middle - 1, middle, middle + 1, n_rows - 2, n_rows - 1]
    return torch.tensor(sorted({row for row in rows if 0 <= row < n_rows}), device="cuda")


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy(reduction):
    n = 17000
    rows = rows_around_the_limit(n, V)
    logits, labels = normal(n, V, scale=3.0).requires_grad_(), labels_of(n)
    labels[2::3] = -100
    labels[rows] = rows % V
    loss = cross_entropy(logits, labels, reduction=reduction)
    upstream = torch.randn_like(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    few = exact(logits[rows])
    expected = F.cross_entropy(few, labels[rows], reduction="none")
    if reduction == "none":
        assert_close_to_reference(loss[rows], expected, torch.float32)
        assert not loss[labels == -100].any()
        upstream = upstream[rows].double()
    else:
        upstream = (upstream.double() / (labels != -100).sum()).expand(len(rows))
    (expected_gradient,) = torch.autograd.grad(expected, few, upstream)
    for row, expected_row in zip(gradient[rows], expected_gradient, strict=True):
        assert_close_to_reference(row, expected_row, DTYPE)
    ignored = (labels == -100).nonzero().flatten()
    assert not gradient[ignored[-3:]].any()


@pytest.mark.parametrize("some_ignored", [False, True], ids=["every_row", "some_rows"])
def test_linear_cross_entropy_with_a_tile_that_large(some_ignored):
    h = 64
    n = 26000 if some_ignored else 17000
    hidden, weight, labels = (
        normal(n, h).requires_grad_(),
        normal(V, h, seed=2, scale=0.1).requires_grad_(),
        labels_of(n),
    )
    if some_ignored:
        labels[2::3] = -100
    valid = (labels != -100).nonzero().flatten()
    rows = valid[rows_around_the_limit(len(valid), V)]
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", tile_bytes=2**40, max_valid=len(valid))
    gradients = torch.autograd.grad(loss, (hidden, weight))

    few, few_weight = exact(hidden[rows]), weight.detach().double()
    few_loss = F.cross_entropy(F.linear(few, few_weight), labels[rows], reduction="sum")
    assert_product_close(gradients[0][rows], *torch.autograd.grad(few_loss, few), DTYPE)
    # Loss and weight's gradient are sums over all rows.
    total, expected = torch.zeros((), device="cuda").double(), torch.zeros(V, h, device="cuda").double()
    whole_weight = weight.detach().float()
    for some in valid.split(2048):
        x = hidden.detach()[some].float()
        log_probabilities = (x @ whole_weight.t()).log_softmax(1)
        total -= log_probabilities.gather(1, labels[some, None]).double().sum()
        d = log_probabilities.exp_()
        d[torch.arange(len(some), device="cuda"), labels[some]] -= 1
        expected += d.t() @ x
    assert_product_close(loss, total, DTYPE)
    assert_product_close(gradients[1], expected, DTYPE)


def test_linear_cross_entropy_with_hidden_states_that_large():
    h, v = 4096, 8
    n = LIMIT // h + 77
    rows = rows_around_the_limit(n, h)
    hidden, weight, labels = normal(n, h).requires_grad_(), normal(v, h, seed=2, scale=0.02), labels_of(n, v)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none", tile_bytes=2**30, max_valid=n)
    upstream = torch.randn_like(loss)
    (gradient,) = torch.autograd.grad(loss, hidden, upstream)
    few = exact(hidden[rows])
    expected = F.cross_entropy(F.linear(few, weight.double()), labels[rows], reduction="none")
    assert_product_close(loss[rows], expected, DTYPE)
    (expected_gradient,) = torch.autograd.grad(expected, few, upstream[rows].double())
    assert_product_close(gradient[rows], expected_gradient, DTYPE)


def rms_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def check_rows(op, reference, inputs: list[Tensor], vectors: list[Tensor]) -> None:
    """Compare results and gradients of a row-wise op, on a few rows of inputs (R, C), with a reference on those alone.

    ``vectors`` are what all rows share.
    """
    rows = rows_around_the_limit(*inputs[0].shape)
    inputs = [x.requires_grad_() for x in inputs]
    results = op(*inputs, *vectors)
    results = (results,) if isinstance(results, Tensor) else results
    upstream = [normal(*y.shape, seed=10 + i) for i, y in enumerate(results)]
    few = [exact(x[rows]) for x in inputs]
    expected = reference(*few, *(v.double() for v in vectors))
    expected = (expected,) if isinstance(expected, Tensor) else expected
    expected_gradients = torch.autograd.grad(expected, few, [each[rows].double() for each in upstream])
    for y, each in zip(results, expected, strict=True):
        assert_close_to_reference(y[rows], each, DTYPE)
    gradients = torch.autograd.grad(results, inputs, upstream)
    for gradient, each in zip(gradients, expected_gradients, strict=True):
        assert_close_to_reference(gradient[rows], each, DTYPE)


@pytest.mark.parametrize("width", [4096, 40000])  # rows in registers, and rows read in blocks
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norms(op, width):
    x, weight, bias = normal(LIMIT // width + 77, width), normal(width, seed=1), normal(width, seed=2)
    if op == "rms_norm":
        check_rows(partial(rms_norm, casting="gemma"), rms_reference, [x], [weight])
    else:
        check_rows(layer_norm, lambda x, w, b: F.layer_norm(x, (width,), w, b), [x], [weight, bias])


def test_add_rms_norm():
    # Halves and smaller multiples of 1/16, whose sums bf16 holds: the sum's rounding is another test's subject.
    x, residual = (normal(LIMIT // 4096 + 77, 4096, seed=i).mul_(2).round_().clamp_(-8, 8) for i in range(2))
    check_rows(
        partial(add_rms_norm, casting="gemma"),
        lambda x, residual, weight: (rms_reference(x + residual, weight), x + residual),
        [x, residual],
        [normal(4096, seed=2)],
    )


def test_swiglu():
    gate, up = (normal(LIMIT // 8192 + 77, 8192, seed=i) for i in range(2))
    check_rows(swiglu, lambda gate, up: F.silu(gate) * up, [gate, up], [])


@pytest.mark.parametrize("token_major", [True, False])
def test_rotary(token_major):
    heads, dim = 32, 128
    tokens = LIMIT // (heads * dim) + 77

    def make(n: int, seed: int) -> Tensor:
        x = (
            normal(1, tokens, n, dim, seed=seed).transpose(1, 2)
            if token_major
            else normal(1, n, tokens, dim, seed=seed)
        )
        return x.detach().requires_grad_()

    q, k, cos, sin = make(heads, 0), make(1, 1), normal(1, tokens, dim, seed=2), normal(1, tokens, dim, seed=3)
    few = torch.tensor([0, 1, tokens // 2, tokens - 78, tokens - 77, tokens - 76, tokens - 1], device="cuda")
    results = rotary(q, k, cos, sin)
    exact_q, exact_k = exact(q[:, :, few]), exact(k[:, :, few])
    expected = rotary_reference(
        exact_q, exact_k, cos[:, few].double(), sin[:, few].double(), interleaved=False, per_pair=False, unsqueeze_dim=1
    )
    upstream = normal(1, tokens, heads, dim, seed=4).transpose(1, 2), normal(1, 1, tokens, dim, seed=5)
    expected_gradients = torch.autograd.grad(
        expected, (exact_q, exact_k), [each[:, :, few].double() for each in upstream]
    )
    for y, each in zip(results, expected, strict=True):
        assert_close_to_reference(y[:, :, few], each, DTYPE)
    gradients = torch.autograd.grad(results, (q, k), upstream)
    for gradient, each in zip(gradients, expected_gradients, strict=True):
        assert_close_to_reference(gradient[:, :, few], each, DTYPE)
