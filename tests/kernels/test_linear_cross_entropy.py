"""linear_cross_entropy against float64 logits, forward and every gradient, over three tiles and more."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F
from wide_tensors import wide_tensors

from liger_trainer.kernels import linear_cross_entropy
from liger_trainer.kernels._tiles import tiles

from .helpers import dtypes_of
from .loss_reference import assert_product_close, doubled, reference_loss

OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "bias": {"bias": "random"},
    "token_weights": {"token_weights": "random"},
    "class_weights": {"class_weights": "random", "label_smoothing": 0.1, "bias": "random"},
    "token_scaling": {"token_scaling": True},
}
N, H, V = 22, 24, 131


def make(device, dtype, n=N, h=H, v=V):
    torch.manual_seed(n + h + v)
    hidden = torch.randn(n, h, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, h, dtype=torch.float64) / h**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(v, (n,)).to(device)
    labels[::3] = -100
    return hidden, weight, labels


def fill(options, device, dtype):
    filled = dict(options)
    if "bias" in filled:
        filled["bias"] = torch.randn(V, dtype=torch.float64).to(device, dtype).requires_grad_()
    if "token_weights" in filled:
        filled["token_weights"] = torch.rand(N, device=device) + 0.1
    if "class_weights" in filled:
        filled["class_weights"] = torch.rand(V, device=device) + 0.1
    return filled


def three_tiles(n_valid, v, dtype):
    tile_bytes = max(1, n_valid // 4) * v * dtype.itemsize
    assert len(list(tiles(n_valid, v, dtype.itemsize, tile_bytes))) >= 3
    return tile_bytes


def check(hidden, weight, labels, dtype, *, reduction="mean", num_items=None, tile_bytes=None, **options):
    n_valid = int((labels != -100).sum())
    tile_bytes = three_tiles(n_valid, len(weight), dtype) if tile_bytes is None else tile_bytes
    extra = {} if num_items is None else {"num_items": num_items}
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, tile_bytes=tile_bytes, **extra, **options)
    inputs = [hidden, weight] + ([options["bias"]] if "bias" in options else [])
    exact = [each.detach().double().requires_grad_() for each in inputs]
    logits = F.linear(*exact)
    reference_options = {k: v for k, v in options.items() if k != "bias"}
    expected = reference_loss(
        logits,
        labels,
        reduction=reduction,
        num_items=None if num_items is None else float(num_items),
        **doubled(reference_options),
    )
    upstream = torch.randn_like(loss)
    gradients = torch.autograd.grad(loss, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    # Half-precision logits are rounded as a linear layer's are, and the loss inherits that.
    assert_product_close(loss, expected, dtype)
    for gradient, expected_gradient, each in zip(gradients, expected_gradients, inputs, strict=True):
        assert gradient.dtype == each.dtype
        assert_product_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(implementation, device, name, reduction):
    for dtype in dtypes_of(device):
        hidden, weight, labels = make(device, dtype)
        check(hidden, weight, labels, dtype, reduction=reduction, **fill(OPTIONS[name], device, dtype))


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7)], ids=["int", "float", "tensor"])
def test_num_items(implementation, device, num_items):
    hidden, weight, labels = make(device, torch.float32)
    num_items = num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items
    check(hidden, weight, labels, torch.float32, num_items=num_items)


@pytest.mark.parametrize(("n", "h", "v"), [(1, 8, 5), (2, 1, 9), (27, 13, 49153), (5, 16, 1)])
def test_shapes(implementation, device, n, h, v):
    for dtype in dtypes_of(device):
        hidden, weight, labels = make(device, dtype, n, h, v)
        labels[0] = v - 1
        check(hidden, weight, labels, dtype, tile_bytes=max(1, n // 4) * v * dtype.itemsize)


def test_leading_dimensions_and_strides(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    views = [
        (hidden.view(2, 11, H), weight, labels.view(2, 11)),
        (hidden.view(2, 11, H)[:, 1:], weight, labels.view(2, 11)[:, 1:]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), labels),
        (hidden[::2], weight[: V // 2], labels[::2] % (V // 2)),
    ]
    for x, w, y in views:
        loss = linear_cross_entropy(x, w, y, tile_bytes=3 * V * 4)
        expected = F.cross_entropy(F.linear(x, w).flatten(0, -2).double(), y.flatten())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_valid", [14, 17, N, N + 5])
def test_upper_bound_changes_nothing(implementation, device, max_valid):
    hidden, weight, labels = make(device, torch.float32)
    assert (labels != -100).sum() == 14
    losses = [linear_cross_entropy(hidden, weight, labels, max_valid=bound) for bound in (None, max_valid)]
    assert torch.equal(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_bound_too_small_is_nan_not_wrong(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    assert linear_cross_entropy(hidden, weight, labels, max_valid=13).isnan()
    assert linear_cross_entropy(hidden, weight, labels, max_valid=13, reduction="none").isnan().all()


@pytest.mark.parametrize("n", [0, 6])
def test_nothing_to_predict(implementation, device, n):
    hidden, weight, labels = make(device, torch.float32, n=n)
    labels.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        assert not loss.any()
        for gradient in torch.autograd.grad(loss.sum(), (hidden, weight)):
            assert not gradient.any()


def test_ignored_rows_do_not_count_even_where_not_finite(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    clean = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, clean)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hidden_states_give_nan(implementation, device, value):
    hidden, weight, labels = make(device, torch.float32)
    with torch.no_grad():
        hidden[1, 2] = value
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_frozen_parts_get_no_gradient(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    (only_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels), hidden)
    (only_weight,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels), weight)
    assert torch.equal(only_hidden, both[0])
    assert torch.equal(only_weight, both[1])
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight.detach(), labels, reduction=reduction)
        upstream = torch.randn_like(loss)
        expected = F.cross_entropy(F.linear(hidden, weight.detach()), labels, reduction=reduction)
        ours, theirs = (torch.autograd.grad(each, hidden, upstream)[0] for each in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_twice_through_a_kept_graph(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0, device=device))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_only_a_graph_that_is_not_kept_is_scaled_in_place(implementation, device):
    hidden, weight, labels = make(device, torch.float32)

    def ops(retain_graph):
        loss = linear_cross_entropy(hidden * 1, weight, labels)
        with torch.profiler.profile() as profile:
            loss.backward(retain_graph=retain_graph)
        return {event.key for event in profile.key_averages()}

    assert "liger_trainer::linear_cross_entropy_backward_" in ops(retain_graph=False)
    assert "liger_trainer::linear_cross_entropy_backward_" not in ops(retain_graph=True)


def test_outputs(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    names = ("token_loss", "token_accuracy", "predicted_tokens", "z_loss")
    out = linear_cross_entropy(
        hidden.view(2, 11, H), weight, labels.view(2, 11), z_loss=1e-3, tile_bytes=3 * V * 4, outputs=names
    )
    logits = F.linear(hidden, weight).view(2, 11, V)
    valid = labels.view(2, 11) != -100
    predicted = logits.argmax(-1)
    assert torch.equal(out.predicted_tokens, predicted.where(valid, -1))
    torch.testing.assert_close(out.token_accuracy, (predicted == labels.view(2, 11))[valid].float().mean())
    torch.testing.assert_close(out.z_loss, 1e-3 * logits.logsumexp(-1)[valid].square().mean())
    torch.testing.assert_close(out.token_loss.sum() / valid.sum(), out.loss)
    assert out.loss.requires_grad
    for extra in out[1:]:
        assert not extra.requires_grad


def test_without_grad_mode_one_product_runs_and_nothing_is_kept(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, tile_bytes=10**9)
    assert loss.grad_fn is None
    assert sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 1


def test_no_tensor_of_the_logits_size(implementation, device):
    """No op in forward or backward meets a tensor of the vocabulary's width and more rows than a tile."""
    hidden, weight, labels = make(device, torch.float32, n=40)
    rows = 5

    def step(reduction, tile_rows):
        with wide_tensors(V, rows=rows, hidden_size=H) as found:
            loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, tile_bytes=tile_rows * V * 4)
            loss.sum().backward()
        return found

    assert not step("mean", rows)
    assert not step("none", rows)
    assert step("mean", rows + 1)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, weight_dtype):
    hidden, weight, labels = make(device, torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, tile_bytes=3 * V * 2)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for ours, theirs, each in zip(gradients, expected_gradients, (hidden, weight), strict=True):
        assert ours.dtype == each.dtype
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()
    if weight_dtype == torch.float32:  # not rounded on its way
        assert not torch.equal(gradients[1], gradients[1].bfloat16().float())


def test_weight_gradient_accumulates_in_fp32(device):
    """256 tiles of equal rows: a bf16 sum would stop growing long before the last."""
    hidden = torch.ones(256, 16, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(4, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(256, device=device, dtype=torch.long)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", tile_bytes=4 * 2)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-192.0, 64, 64, 64], device=device).unsqueeze(1).expand(4, 16)
    assert torch.equal(gradient.float(), expected)


@pytest.mark.parametrize(("n", "at_once"), [(2 * H, True), (2 * H + 1, False)])
def test_all_rows_at_once_where_that_costs_no_memory(device, n, at_once):
    """For bf16 up to about 2 H rows: no wider buffer for the weight's gradient, and the same numbers."""
    dtype, tile_bytes = torch.bfloat16, 5 * V * 2
    hidden, weight, labels = make(device, dtype, n=n)
    labels.clamp_(min=0)
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_cross_entropy(hidden, weight, labels, tile_bytes=tile_bytes)
    products = [event for event in profile.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert (len(products) == 3) == at_once
    assert at_once == any(event.input_shapes[0] == [V, n] for event in products)
    check(hidden, weight, labels, dtype, tile_bytes=tile_bytes)
    check(hidden, weight, labels, dtype, tile_bytes=tile_bytes, reduction="none")
    losses = [linear_cross_entropy(hidden, weight, labels, tile_bytes=each) for each in (tile_bytes, None)]
    gradients = [torch.autograd.grad(each, (hidden, weight)) for each in losses]
    for ours, once in zip(*gradients, strict=True):
        assert (ours - once).norm() < 4e-3 * once.norm()


def test_gradient_dtype_of_the_weight_is_honoured(device):
    hidden, weight, labels = make(device, torch.bfloat16, n=200)
    weight = weight.detach().requires_grad_()
    weight.grad_dtype = torch.float32
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    for tile_bytes in (5 * V * 2, 1000 * V * 2):
        weight.grad = None
        linear_cross_entropy(hidden, weight, labels, reduction="sum", tile_bytes=tile_bytes).backward()
        (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels, reduction="sum"), exact[1:])
        assert weight.grad.dtype == torch.float32
        assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
        assert (weight.grad - expected).norm() < 4e-3 * expected.norm()


def test_a_leaf_takes_the_gradient_without_a_copy(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    weight = weight.detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    held = next(each for each in loss.grad_fn.saved_tensors if each.shape == weight.shape)
    pointer = held.data_ptr()
    del held
    loss.backward()
    assert weight.grad.data_ptr() == pointer


def test_gradcheck():
    hidden, weight, labels = make("cpu", torch.float64, n=7, h=5, v=9)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, dtype=torch.float64)
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h,
                w,
                labels,
                bias=b,
                reduction=reduction,
                softcap=4.0,
                temperature=0.8,
                label_smoothing=0.1,
                z_loss=1e-2,
                token_weights=weights,
                tile_bytes=2 * 9 * 8,
            ),
            (hidden, weight, bias),
        )


def test_double_backward_raises(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


def test_compiles_without_breaks_or_recompilation(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, w, y: linear_cross_entropy(x * 2, w, y, softcap=9.0, tile_bytes=3 * V * 4),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    compilations = []
    for n in (9, 16, 31):
        hidden, weight, labels = make(device, torch.float32, n=n)
        loss = compiled(hidden, weight, labels)
        expected = F.cross_entropy(9 * torch.tanh(F.linear(hidden * 2, weight) / 9), labels)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_inputs_are_not_written(implementation, device):
    inputs = make(device, torch.float32)
    before = [each.detach().clone() for each in inputs]
    linear_cross_entropy(*inputs).backward()
    assert all(torch.equal(each, copy) for each, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must lie in \[0, 1\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"tile_bytes": 0}, ValueError, "tile_bytes must be above 0"),
        ({"num_items": 0}, ValueError, "num_items must be above 0"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items divides"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(9,\)"),
        ({"token_weights": torch.ones(4)}, ValueError, r"token_weights must have labels' shape \(5,\)"),
        ({"weight": torch.ones(9, 4)}, ValueError, r"weight must have shape \(V, 3\)"),
        ({"weight": torch.ones(9, 3, dtype=torch.float64)}, TypeError, "weight must have hidden's dtype"),
        ({"weight": torch.ones(9, 3, device="meta")}, ValueError, "weight is on meta"),
        ({"hidden": torch.ones(5, 3, dtype=torch.long)}, TypeError, "hidden must have a floating point dtype"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, ValueError, "labels must have hidden's shape"),
        ({"labels": torch.full((5,), 9)}, ValueError, r"labels must lie in \[0, 9\)"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be a floating point dtype"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "hidden": torch.randn(5, 3),
        "weight": torch.randn(9, 3),
        "labels": torch.zeros(5, dtype=torch.long),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)
