"""rotary against float64 versions of the models' own formulas, forward and gradients, both implementations."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from liger_trainer.kernels import rotary

from .helpers import ON_GPU, RecordOutputs, assert_close_to_reference, doubled, dtypes_of, rounded

# (B, S, Hq, Hk, D, R)
SHAPES = [
    (2, 5, 4, 2, 16, 16),
    (1, 1, 1, 1, 2, 2),
    (3, 7, 5, 1, 12, 8),
    (1, 3, 9, 3, 26, 26),
    (2, 0, 4, 2, 8, 8),
    (0, 3, 4, 2, 8, 8),
]
if ON_GPU:
    SHAPES += [(2, 513, 32, 8, 128, 128), (1, 1000, 9, 3, 64, 64), (2, 77, 40, 40, 80, 32), (2, 33, 8, 1, 256, 256)]


def rotate_half(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def reference(q, k, cos, sin, *, interleaved, per_pair, unsqueeze_dim):
    """As the models write it: full tables, x * cos + rotate_half(x) * sin, the rest concatenated."""
    if per_pair:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    width = cos.shape[-1]

    def rotate(x):
        turned, rest = x[..., :width], x[..., width:]
        return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, rest), dim=-1)

    return rotate(q), rotate(k)


def make_inputs(shape, device, dtype, *, unsqueeze_dim=1, token_major=True, per_pair=False, batch_table=True):
    batch, tokens, q_heads, k_heads, dim, width = shape
    make = partial(rounded, device=device, dtype=dtype)

    def heads(n, seed):
        x = make(batch, tokens, n, dim, seed=seed) if token_major else make(batch, n, tokens, dim, seed=seed)
        return x if token_major == (unsqueeze_dim == 2) else x.transpose(1, 2)

    table = (batch if batch_table else 1, tokens, width // 2 if per_pair else width)
    # No cosines and sines: the two halves differ, and no identity between them hides a mistake.
    return heads(q_heads, 0), heads(k_heads, 1), make(*table, seed=2).detach(), make(*table, seed=3).detach()


def check(q, k, cos, sin, *, unsqueeze_dim=1, interleaved=False, per_pair=False):
    before = [tensor.detach().clone() for tensor in (q, k, cos, sin)]
    options = {"interleaved": interleaved, "per_pair": per_pair, "unsqueeze_dim": unsqueeze_dim}
    results = rotary(q, k, cos, sin, **options)
    leaves = doubled(q), doubled(k)
    tables = cos.double().cpu(), sin.double().cpu()
    expected = reference(*leaves, *tables, **options)
    grads = [rounded(*y.shape, device=y.device, dtype=y.dtype, seed=7).detach() for y in results]
    # A result is the difference of two products: their sizes bound the rounding.
    largest = 2 * max([t.abs().max().item() for t in (*tables,) if t.numel()], default=0.0)
    exact_grads = [grad.double().cpu() for grad in grads]
    size = [largest * t.detach().abs().max().item() if t.numel() else 0.0 for t in (*leaves, *exact_grads)]
    gradients = torch.autograd.grad(results, (q, k), grads)
    expected_gradients = torch.autograd.grad(expected, leaves, exact_grads)
    exact_results = (*expected, *expected_gradients)
    for y, x, exact, bound in zip((*results, *gradients), (q, k, q, k), exact_results, size, strict=True):
        assert y.shape == x.shape
        if y.numel():
            assert_close_to_reference(y, exact, y.dtype, magnitude=bound)
    for tensor, copy in zip((q, k, cos, sin), before, strict=True):
        assert torch.equal(tensor, copy)
    return results, gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(implementation, device, shape):
    for dtype in dtypes_of(device):
        for batch_table in (True, False):
            check(*make_inputs(shape, device, dtype, batch_table=batch_table))


BOTH = (False, True)


@pytest.mark.parametrize(
    ("interleaved", "per_pair", "unsqueeze_dim", "token_major"), list(product(BOTH, BOTH, (1, 2), BOTH))
)
def test_layouts(implementation, device, interleaved, per_pair, unsqueeze_dim, token_major):
    for shape in ((2, 5, 4, 2, 16, 16), (3, 4, 5, 1, 14, 6)):  # whole and partial heads
        q, k, cos, sin = make_inputs(
            shape, device, torch.float32, unsqueeze_dim=unsqueeze_dim, token_major=token_major, per_pair=per_pair
        )
        results, gradients = check(
            q, k, cos, sin, interleaved=interleaved, per_pair=per_pair, unsqueeze_dim=unsqueeze_dim
        )
        # What q has in memory order, results and gradients have.
        for tensor in (results[0], gradients[0]):
            assert tensor.stride() == q.stride()


def test_more_heads_than_one_tile(implementation, device):
    check(*make_inputs((1, 2, 37, 3, 256, 256), device, torch.float32))


def test_strided_inputs(implementation, device):
    make = partial(rounded, device=device, dtype=torch.float32)
    cos, sin = (make(1, 5, 8, seed=seed).detach() for seed in (2, 3))
    fused = make(2, 5, (4 + 2 + 2) * 8).unflatten(-1, (8, 8)).transpose(1, 2)  # q, k and v from one projection
    check(fused[:, :4], fused[:, 4:6], cos, sin)
    check(make(2, 4, 5, 16)[..., ::2], make(2, 2, 5, 16)[..., 1::2], cos, sin)
    check(make(2, 4, 8, 5).transpose(2, 3), make(2, 2, 5, 8), cos, sin)
    check(make(1, 4, 5, 8).expand(2, -1, -1, -1), make(2, 1, 5, 8).expand(-1, 2, -1, -1), cos, sin)
    q, k = make(2, 4, 5, 8), make(2, 2, 5, 8)
    wide_cos, wide_sin = (make(1, 5, 16, seed=seed).detach() for seed in (2, 3))
    check(q, k, wide_cos[..., :8], wide_sin[..., :8])
    check(q, k, wide_cos[..., ::2], wide_sin[..., 1::2])
    check(q, k, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    check(q, k, cos.expand(2, -1, -1), sin.repeat(2, 1, 1))
    check(q, k, wide_cos[..., :4], wide_sin[..., :4], interleaved=True, per_pair=True)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_the_result(implementation, device, dtype, table_dtype):
    q, k, cos, sin = make_inputs((2, 3, 4, 2, 8, 6), device, dtype)
    cos, sin = cos.to(table_dtype), sin.to(table_dtype)
    plain = reference(q, k, cos, sin, interleaved=False, per_pair=False, unsqueeze_dim=1)
    for keep_dtype in (False, True):
        results = rotary(q, k, cos, sin, keep_dtype=keep_dtype)
        for y, eager in zip(results, plain, strict=True):
            assert y.dtype == (dtype if keep_dtype else eager.dtype)
            torch.testing.assert_close(y.double(), eager.double(), rtol=3e-2, atol=6e-2)
        with RecordOutputs("backward") as record:  # autograd would cast a gradient of another dtype, unseen
            torch.autograd.grad(results[0].sum() + results[1].sum(), (q, k))
        assert [tensor.dtype for tensor in record.outputs[0]] == [dtype, dtype]


def test_only_one_of_both_is_used(implementation, device):
    q, k, cos, sin = make_inputs((1, 3, 4, 2, 8, 8), device, torch.float32)
    dq, dk = torch.autograd.grad(rotary(q, k, cos, sin)[0].sum(), (q, k))
    assert dq.norm() > 0
    assert dk.norm() == 0


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("interleaved", BOTH)
def test_no_keys(implementation, device, interleaved, unsqueeze_dim):
    """Queries alone: what they give beside keys, and a gradient where the keys' output is not used."""
    options = {"interleaved": interleaved, "unsqueeze_dim": unsqueeze_dim}
    q, k, cos, sin = make_inputs((2, 5, 4, 2, 16, 12), device, torch.float32, unsqueeze_dim=unsqueeze_dim)
    beside = rotary(q, k, cos, sin, **options)[0]
    alone, nothing = rotary(q, q.narrow(unsqueeze_dim, 0, 0), cos, sin, **options)
    assert torch.equal(alone, beside)
    assert nothing.shape == q.narrow(unsqueeze_dim, 0, 0).shape
    upstream = rounded(*alone.shape, device=device, dtype=torch.float32, seed=5).detach()
    for ours, expected in zip(
        torch.autograd.grad(alone, q, upstream), torch.autograd.grad(beside, q, upstream), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
def test_gradcheck(interleaved, per_pair):
    q, k, cos, sin = make_inputs((2, 3, 3, 1, 8, 6), torch.device("cpu"), torch.float64, per_pair=per_pair)
    op = partial(rotary, cos=cos, sin=sin, interleaved=interleaved, per_pair=per_pair)
    assert torch.autograd.gradcheck(lambda q, k: op(q, k), (q, k))


def test_float64_stays_float64(implementation, device):
    inputs = [t.detach() for t in make_inputs((2, 3, 4, 2, 8, 6), device, torch.float64)]
    expected = reference(*inputs, interleaved=False, per_pair=False, unsqueeze_dim=1)
    for y, exact in zip(rotary(*inputs), expected, strict=True):
        assert_close_to_reference(y, exact, torch.float64)


def test_double_backward_raises():
    q, k, cos, sin = make_inputs((1, 3, 4, 2, 8, 8), torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="rotary has no second derivative"):
        torch.autograd.grad(rotary(q, k, cos, sin)[0].sum(), q, create_graph=True)


def test_bad_inputs():
    q, k, cos, sin = (t.detach() for t in make_inputs((2, 3, 4, 2, 8, 8), torch.device("cpu"), torch.float32))
    with pytest.raises(ValueError, match=r"unsqueeze_dim must be 1.* or 2.* got 3"):
        rotary(q, k, cos, sin, unsqueeze_dim=3)
    with pytest.raises(ValueError, match=r"q must have 4 dimensions, got shape \(4, 3, 8\)"):
        rotary(q[0], k, cos, sin)
    with pytest.raises(ValueError, match="may differ in their number of heads"):
        rotary(q, k[:, :, :2], cos, sin)
    with pytest.raises(ValueError, match="may differ in their number of heads"):
        rotary(q, k, cos, sin, unsqueeze_dim=2)
    with pytest.raises(ValueError, match="same shape"):
        rotary(q, k, cos, sin[..., :4])
    with pytest.raises(ValueError, match=r"shape \(1 or 2, 3, R\), got \(2, 2, 8\)"):
        rotary(q, k, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match="even number"):
        rotary(q, k, cos[..., :3], sin[..., :3])
    with pytest.raises(ValueError, match="at most its 8"):
        rotary(q, k, cos, sin, per_pair=True)
    with pytest.raises(TypeError, match="k must have a floating point dtype"):
        rotary(q, k.int(), cos, sin)
    with pytest.raises(ValueError, match="sin is on meta"):
        rotary(q, k, cos, sin.to("meta"))
    with pytest.raises(ValueError, match="cos and sin get no gradient"):
        rotary(q, k, cos.requires_grad_(), sin)
