"""add_rms_norm against float64 and against the two operations that it joins, both implementations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from liger_trainer.kernels import _norm_kernels, add_rms_norm, rms_norm

from .helpers import ON_GPU, RecordOutputs, assert_close_to_reference, doubled, dtypes_of, rounded, strided_views
from .test_norms import EPS, SHAPES, magnitudes, rms_reference

CASTINGS = [("llama", 0.0), ("gemma", 1.0), ("none", 0.0)]


def check(x, residual, weight, *, offset=0.0, casting="llama"):
    """Compare y, total and every gradient with float64 and, bit for bit, the results with those of the two ops."""
    leaves = [tensor for tensor in (x, residual, weight) if tensor is not None]
    before = [leaf.detach().clone() for leaf in leaves]
    y, total = add_rms_norm(x, residual, weight, EPS, offset=offset, casting=casting)
    with torch.no_grad():
        separate = x + residual
        assert torch.equal(total, separate)
        assert total.dtype == separate.dtype
        expected_y = rms_norm(separate, weight, EPS, offset=offset, casting=casting)
        assert torch.equal(y, expected_y)
        assert y.dtype == expected_y.dtype

    # float64 from the rounded sum on: its rounding has the derivative 1 by definition
    exact_x, exact_residual, exact_weight = (doubled(tensor) for tensor in (x, residual, weight))
    exact_leaves = [tensor for tensor in (exact_x, exact_residual, exact_weight) if tensor is not None]
    exact_sum = exact_x + exact_residual
    exact_total = exact_sum + (total.detach().double().cpu() - exact_sum.detach())
    exact_y = rms_reference(exact_total, exact_weight, offset=offset)
    # "llama" rounds the normalised row to total's dtype, even where the weight makes the result fp32
    assert_close_to_reference(y, exact_y, total.dtype if y.dtype == torch.float32 and casting == "llama" else y.dtype)
    dy = rounded(*y.shape, device=y.device, dtype=y.dtype, seed=7).detach()
    dtotal = rounded(*y.shape, device=y.device, dtype=total.dtype, seed=8).detach()
    size_dx, size_dweight, _ = magnitudes(
        exact_total.detach(), None if weight is None else exact_weight.detach(), dy.double().cpu(), offset, False
    )
    gradients = torch.autograd.grad((y, total), leaves, (dy, dtotal))
    exact_gradients = torch.autograd.grad(
        (exact_y, exact_total), exact_leaves, (dy.double().cpu(), dtotal.double().cpu())
    )
    sizes = [size_dx + dtotal.abs().double().cpu()] * 2 + [size_dweight]
    for leaf, gradient, exact, size in zip(leaves, gradients, exact_gradients, sizes, strict=False):
        assert gradient.dtype == leaf.dtype
        if leaf is weight and casting == "llama" and leaf.dtype != torch.float64:
            size = size * max(1.0, torch.finfo(total.dtype).eps / torch.finfo(torch.float32).eps / 16)
        assert_close_to_reference(gradient, exact, leaf.dtype, magnitude=size)
    for leaf, copy in zip(leaves, before, strict=True):
        assert torch.equal(leaf, copy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("casting", "offset"), CASTINGS)
def test_shapes_and_dtypes(implementation, device, casting, offset, shape):
    for dtype in dtypes_of(device):
        make = partial(rounded, device=device, dtype=dtype)
        check(make(*shape), make(*shape, seed=3), make(shape[-1], seed=1), offset=offset, casting=casting)


@pytest.mark.parametrize(("casting", "offset"), CASTINGS)
def test_rows_wider_than_registers(implementation, device, casting, offset, monkeypatch):
    """The loops over blocks, by making a tile small instead of a row wide."""
    monkeypatch.setattr(_norm_kernels, "_tile", lambda width, limit: (32, 1, 1))
    make = partial(rounded, device=device, dtype=torch.float32)
    check(make(3, 2, 75), make(3, 2, 75, seed=3), make(75, seed=1), offset=offset, casting=casting)
    check(make(5, 64), make(5, 64, seed=3), None, offset=offset, casting=casting)


@pytest.mark.parametrize("name", strided_views(torch.empty))
def test_strided_inputs(implementation, device, name):
    make = partial(rounded, device=device, dtype=torch.float32)
    x = strided_views(make)[name]
    residual = strided_views(partial(make, seed=3))[name]
    weight = make(8, seed=1)
    check(x, residual, weight)
    check(x, make(2, 3, 5, 8, seed=3), make(16, seed=1)[::2])
    check(make(2, 3, 5, 8), residual, weight)
    check(x, strided_views(partial(make, seed=3))["tokens_before_batch"], None)


def test_memory_order_of_the_results(implementation, device):
    make = partial(rounded, device=device, dtype=torch.float32)
    x = make(2, 5, 3, 8).detach().transpose(1, 2).requires_grad_()
    residual = make(2, 3, 5, 8, seed=3)
    with RecordOutputs("backward") as record:
        y, total = add_rms_norm(x, residual, torch.ones(8, device=device))
        torch.autograd.grad((y, total), (x, residual), (torch.ones_like(residual), torch.ones_like(residual)))
    assert y.stride() == total.stride() == record.outputs[0][0].stride() == x.stride()
    transposed = make(8, 5).detach().t()
    assert all(tensor.is_contiguous() for tensor in add_rms_norm(transposed, transposed, None))


def test_strided_gradients(implementation, device):
    make = partial(rounded, device=device, dtype=torch.float32)
    leaves = make(2, 3, 5, 8), make(2, 3, 5, 8, seed=3), make(8, seed=1)
    separate = leaves[0] + leaves[1]
    outputs, expected_outputs = add_rms_norm(*leaves, EPS), (rms_norm(separate, leaves[2], EPS), separate)
    upstream = [strided_views(lambda *shape, seed=seed: make(*shape, seed=seed).detach()) for seed in (7, 8)]
    for name in upstream[0]:
        grads = [views[name] for views in upstream]
        gradients = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        expected = torch.autograd.grad(expected_outputs, leaves, grads, retain_graph=True)
        torch.testing.assert_close(gradients, expected)


def test_without_weight(implementation, device):
    for dtype in dtypes_of(device):
        make = partial(rounded, device=device, dtype=dtype)
        for casting, offset in CASTINGS:
            check(make(6, 40), make(6, 40, seed=3), None, casting=casting, offset=offset)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_dtypes(implementation, device, x_dtype, residual_dtype, weight_dtype):
    x = rounded(5, 24, device=device, dtype=x_dtype)
    residual = rounded(5, 24, device=device, dtype=residual_dtype, seed=3)
    weight = rounded(24, device=device, dtype=weight_dtype, seed=1)
    if len(dtypes_of(device)) > 1:
        for casting, offset in CASTINGS:
            check(x, residual, weight, casting=casting, offset=offset)
    y, total = add_rms_norm(x, residual, weight)
    assert (y.dtype, total.dtype) == (rms_norm(x + residual, weight).dtype, (x + residual).dtype)
    gradients = torch.autograd.grad(y.sum() + total.sum(), (x, residual, weight))
    assert [gradient.dtype for gradient in gradients] == [x_dtype, residual_dtype, weight_dtype]


def test_norm_reads_the_rounded_sum(implementation, device):
    """In fp16, where most rows of the exact sum have another norm."""
    x, residual = (rounded(64, 48, device=device, dtype=torch.float16, seed=seed).detach() for seed in (0, 1))
    y, total = add_rms_norm(x, residual, None, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, None, EPS))
    assert not torch.equal(y, rms_norm(x.float() + residual.float(), None, EPS).half())


@pytest.mark.parametrize("used", ["y", "total"])
def test_one_output_used(implementation, device, used):
    make = partial(rounded, device=device, dtype=torch.float32)
    x, residual, weight = make(5, 24), make(5, 24, seed=3), make(24, seed=1)
    dy = make(5, 24, seed=7).detach()
    with RecordOutputs("backward") as record:
        y, total = add_rms_norm(x, residual, weight, EPS)
        gradients = torch.autograd.grad(y if used == "y" else total, (x, residual, weight), dy, allow_unused=True)
    if used == "y":
        separate = x + residual
        expected = torch.autograd.grad(rms_norm(separate, weight, EPS), (x, residual, weight), dy)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    else:
        assert not record.outputs
        assert torch.equal(gradients[0], dy) and torch.equal(gradients[1], dy)
        assert gradients[2] is None


def test_only_wanted_gradients_are_computed(implementation, device):
    make = partial(rounded, device=device, dtype=torch.float32)
    x, residual, weight = make(5, 24), make(5, 24, seed=3), make(24, seed=1)
    full = add_rms_norm(x, residual, weight)
    expected = torch.autograd.grad(full[0].sum() + full[1].square().sum(), (x, residual, weight))
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((x, residual, weight), wanted, strict=True)]
        with RecordOutputs("backward") as record:
            y, total = add_rms_norm(*inputs)
            (y.sum() + total.square().sum()).backward()
        (outputs,) = record.outputs
        assert (outputs[1] is not None) == wanted[2]
        for tensor, gradient in zip(inputs, expected, strict=True):
            assert tensor.grad is None or torch.equal(tensor.grad, gradient)
        assert [tensor.grad is not None for tensor in inputs] == list(wanted)
    with torch.no_grad():
        assert not any(tensor.requires_grad for tensor in add_rms_norm(x, residual, weight))


def both(x, residual, weight, fused):
    """y and total, each used once more than the next layer would."""
    if fused:
        y, total = add_rms_norm(x, residual, weight, EPS)
    else:
        total = x + residual
        y = rms_norm(total, weight, EPS)
    return (y * y.detach().cos()).sum() + (total * total.detach().sin()).sum()


def test_gradients_of_two_leaves_share_no_memory(implementation, device):
    """One tensor goes to both; what accumulates in one must not reach the other."""
    make = partial(rounded, device=device, dtype=torch.float32)
    for hooked in (False, True):
        results = []
        for fused in (True, False):
            x, residual, weight = make(5, 24), make(5, 24, seed=3), make(24, seed=1)
            if hooked:  # accumulates after a hook that keeps the gradient alive, as DDP's and FSDP's do
                seen = []
                for leaf in (x, residual):
                    leaf.register_hook(seen.append)
                    leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "seen", leaf.grad.mul_(1)))
            both(x, residual, weight, fused).backward()
            assert x.grad.data_ptr() != residual.grad.data_ptr()
            x.grad.mul_(3)  # as clipping or unscaling does
            loss = both(x, residual, weight, fused)
            loss.backward(retain_graph=True)
            loss.backward()
            residual.grad.add_(1)
            both(x, residual, weight, fused).backward()
            results.append([leaf.grad for leaf in (x, residual, weight)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("order", [0, 1])
def test_gradients_added_to_on_their_way(implementation, device, order):
    """x and residual are used again elsewhere: their gradients meet others, before and after reaching this op."""
    make = partial(rounded, device=device, dtype=torch.float32)
    results = []
    for fused in (True, False):
        leaves = make(5, 24), make(5, 24, seed=3), make(24, seed=1)
        x, residual = leaves[0] * 2, leaves[1] * 3
        early = (x * 5).sum() + (residual * 7).sum()
        loss = both(x, residual, leaves[2], fused)
        late = (x * 11).sum() + (residual * 13).sum()
        total = early + loss + late if order else late + loss + early
        total.backward(retain_graph=True)
        total.backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_same_tensor_twice(implementation, device):
    make = partial(rounded, device=device, dtype=torch.float32)
    for interior in (False, True):
        results = []
        for fused in (True, False):
            leaf, weight = make(5, 24), make(24, seed=1)
            x = leaf * 2 if interior else leaf
            loss = both(x, x, weight, fused)
            loss.backward(retain_graph=True)
            loss.backward()
            results.append([leaf.grad, weight.grad])
        torch.testing.assert_close(*results)


def test_stream_of_layers(implementation, device):
    """total goes on as the next residual, as in a decoder."""
    make = partial(rounded, device=device, dtype=torch.float32)
    results = []
    for fused in (True, False):
        x, residual = make(5, 24), make(5, 24, seed=3)
        weights = [make(24, seed=seed) for seed in range(4)]
        y, stream = x, residual
        for weight in weights:
            if fused:
                y, stream = add_rms_norm(y, stream, weight, EPS)
            else:
                stream = y + stream
                y = rms_norm(stream, weight, EPS)
            y = y.sin()
        ((y + stream) ** 2).sum().backward()
        results.append([leaf.grad for leaf in (x, residual, *weights)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_saves_the_sum_and_a_number_a_row():
    x, residual, weight = (torch.randn(*shape, requires_grad=True) for shape in ((6, 32), (6, 32), (32,)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total = add_rms_norm(x, residual, weight)
    assert [tuple(tensor.shape) for tensor in saved] == [(6, 32), (32,), (6,)]
    assert saved[0].data_ptr() == total.data_ptr()


@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_gradcheck(implementation, device, casting):
    x, residual = (
        torch.randn(2, 5, 3, 7, dtype=torch.float64, device=device).transpose(1, 2).requires_grad_() for _ in range(2)
    )
    weight = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    function = partial(add_rms_norm, offset=1.0, casting=casting)
    assert torch.autograd.gradcheck(function, (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r: function(x, r, None), (x, residual))
    assert torch.autograd.gradcheck(lambda x, r: function(x, r, weight.detach())[0], (x, residual))


def test_float64_with_a_narrower_residual(implementation, device):
    x = torch.randn(3, 11, device=device, dtype=torch.float64)
    residual = torch.randn(3, 11, device=device)
    y, total = add_rms_norm(x, residual, None, EPS)
    assert torch.equal(total, x + residual)
    assert_close_to_reference(y, rms_reference(total, None), torch.float64)


def test_whole_graph_with_any_number_of_tokens(implementation, device):
    """With both outputs used, with one, and with a frozen weight."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x, residual, weight):
        y, total = add_rms_norm(x, residual, weight, offset=1.0, casting="gemma")
        y, _ = add_rms_norm(y, total, weight)
        return y.sin(), total

    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for tokens in (5, 7, 16):
        make = partial(rounded, device=device, dtype=torch.float32)
        leaves = make(2, tokens, 16), make(2, tokens, 16, seed=3), make(16, seed=1)
        for used in (slice(2), slice(1)):
            outputs = compiled(*leaves), block(*leaves)
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(
                *(torch.autograd.grad([o.sum() for o in output[used]], leaves) for output in outputs)
            )
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]
    frozen = *leaves[:2], leaves[2].detach()
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(o.sum() for o in f(*frozen)), leaves[:2]) for f in (compiled, block))
    )


def test_opcheck():
    make = partial(rounded, device=torch.device("cpu"), dtype=torch.float32)
    for name, dtype in (
        ("heads_from_tokens", torch.float64),
        ("half_of_each_row", torch.float32),
        ("columns_outside", torch.float16),
    ):
        x, residual = (strided_views(partial(make, seed=seed))[name].detach() for seed in (0, 3))
        residual = residual.to(dtype)
        arguments = x, residual, make(8, seed=1).detach(), EPS, 0.0, "llama"
        ops = torch.ops.liger_trainer
        torch.library.opcheck(ops.add_rms_norm_forward.default, arguments)
        y, total, rstd = ops.add_rms_norm_forward(*arguments)
        for dtotal in (None, torch.randn_like(total)):
            torch.library.opcheck(
                ops.add_rms_norm_backward.default, (y, dtotal, total, arguments[2], rstd, 0.0, "llama", True)
            )


@pytest.mark.skipif(not ON_GPU, reason="the CPU's autocast leaves the norms alone")
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_autocast_on_a_gpu(casting):
    x, residual = (torch.randn(4, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y, total = add_rms_norm(x, residual, weight, casting=casting)
        expected = rms_norm(x + residual, weight, casting=casting)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected) and torch.equal(total, x + residual)
    gradients = (torch.autograd.grad(z.sum(), (x, residual, weight)) for z in (y, expected))
    torch.testing.assert_close(*gradients)


def test_nonfinite_rows_stay_to_themselves(implementation, device):
    x, residual = torch.randn(3, 10, device=device), torch.randn(3, 10, device=device)
    residual[1, 4] = float("inf")
    y, total = add_rms_norm(x, residual, torch.ones(10, device=device))
    assert y[1].isnan().any() and total[1].isinf().any()
    assert y[[0, 2]].isfinite().all()


def test_double_backward_raises():
    x = torch.randn(3, 4, requires_grad=True)
    for output in add_rms_norm(x, x.detach(), torch.ones(4)):
        with pytest.raises(RuntimeError, match="add_rms_norm has no second derivative"):
            torch.autograd.grad(output.sum(), x, create_graph=True)


def test_bad_inputs():
    x, weight = torch.randn(3, 4), torch.ones(4)
    for shape in ((4,), (1, 4), (3, 1), (1, 3, 4), (4, 3)):
        with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 4\), got "):
            add_rms_norm(x, torch.randn(shape), weight)
    with pytest.raises(TypeError, match="residual must have a floating point dtype"):
        add_rms_norm(x, x.long(), weight)
    with pytest.raises(TypeError, match="x must have a floating point dtype"):
        add_rms_norm(x.long(), x, weight)
    with pytest.raises(ValueError, match="residual is on meta"):
        add_rms_norm(x, x.to("meta"), weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\)"):
        add_rms_norm(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="casting must be one of"):
        add_rms_norm(x, x, weight, casting="lama")
    with pytest.raises(ValueError, match="at least one dimension"):
        add_rms_norm(torch.tensor(1.0), torch.tensor(1.0), None)
