"""linear_log_probs against float64 logits: every output and every gradient, tiles kept and tiles recomputed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from wide_tensors import wide_tensors

from liger_trainer.kernels import LOG_PROB_OUTPUTS, LogProbs, linear_log_probs

from .helpers import dtypes_of
from .loss_reference import assert_product_close

linear_log_probs_module = sys.modules[linear_log_probs.__module__]
N, H, V = 22, 24, 131
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
    "bias": {"bias": True},
}
DIFFERENTIABLE = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")


def make(device, dtype, n=N, h=H, v=V):
    torch.manual_seed(n + h + v)
    hidden = torch.randn(n, h, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, h, dtype=torch.float64) / h**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(v, (n,)).to(device)
    labels[::3] = -100
    return hidden, weight, labels


def reference(logits: Tensor, labels: Tensor, logit_scale=1.0, softcap=None, temperature=1.0) -> LogProbs:
    z = logits * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    valid = labels != -100
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    of_labels = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    rows = of_labels, -(p * log_p).sum(-1), z.mean(-1), p.square().sum(-1).log()
    return LogProbs(*(each.where(valid, 0) for each in rows), (z.argmax(-1) == labels) & valid)


def check(hidden, weight, labels, dtype, *, wrt=DIFFERENTIABLE, bias=None, tile_rows=3, kept_rows=4, **options):
    """Compare outputs and gradients under random upstream gradients of the outputs named in ``wrt``."""
    bytes_of_row = len(weight) * dtype.itemsize
    least_memory = options.pop("least_memory", False)
    ours = linear_log_probs(
        hidden,
        weight,
        labels,
        bias=bias,
        outputs=LOG_PROB_OUTPUTS,
        tile_bytes=tile_rows * bytes_of_row,
        cache_bytes=kept_rows * bytes_of_row,
        least_memory=least_memory,
        **options,
    )
    inputs = [each for each in (hidden, weight, bias) if each is not None]
    exact = [each.detach().double().cpu().requires_grad_(each.requires_grad) for each in inputs]
    logits = F.linear(*exact)
    logits = logits + (logits.to(dtype) - logits).detach()  # rounded as a linear layer's, which exp makes much of
    expected = reference(logits, labels.cpu(), **options)
    for name in DIFFERENTIABLE:
        assert_product_close(getattr(ours, name), getattr(expected, name), dtype)
    if dtype == torch.float32:  # rounded logits tie
        assert torch.equal(ours.top1.cpu(), expected.top1)
    upstream = [torch.randn(labels.shape, generator=torch.Generator().manual_seed(i)) for i in range(len(wrt))]
    gradients = torch.autograd.grad(
        [getattr(ours, name) for name in wrt],
        [each for each in inputs if each.requires_grad],
        [each.to(hidden.device, getattr(ours, name).dtype) for each, name in zip(upstream, wrt, strict=True)],
    )
    expected_gradients = torch.autograd.grad(
        [getattr(expected, name) for name in wrt],
        [each for each in exact if each.requires_grad],
        [each.double() for each in upstream],
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_product_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("wrt", [("log_probs",), ("entropy",), ("mean_logits",), ("log_sum_sq_probs",), DIFFERENTIABLE])
def test_outputs_and_gradients(implementation, device, name, wrt):
    for dtype in dtypes_of(device):
        hidden, weight, labels = make(device, dtype)
        options = dict(OPTIONS[name])
        if options.pop("bias", False):
            options["bias"] = torch.randn(V, dtype=torch.float64).to(device, dtype).requires_grad_()
        check(hidden, weight, labels, dtype, wrt=wrt, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("wrt", [("log_probs",), DIFFERENTIABLE])
@pytest.mark.parametrize(("frozen", "kept_rows"), [((), 0), ((0,), 0), ((1,), 0), ((), 4), ((), 100)])
def test_least_memory(implementation, device, name, wrt, frozen, kept_rows):
    for dtype in dtypes_of(device):
        *tensors, labels = make(device, dtype)
        tensors = [each.detach() if i in frozen else each for i, each in enumerate(tensors)]
        options = dict(OPTIONS[name])
        if options.pop("bias", False):
            options["bias"] = torch.randn(V, dtype=torch.float64).to(device, dtype).requires_grad_()
        check(*tensors, labels, dtype, wrt=wrt, least_memory=True, kept_rows=kept_rows, **options)


def test_least_memory_makes_no_wider_gradient(device):
    """Each class's part of the weight's gradient comes out of one product over all rows, rounded in its registers."""
    hidden, weight, labels = make(device, torch.bfloat16, n=200)
    labels = labels.clamp(min=0)
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_log_probs(hidden, weight, labels, least_memory=True, tile_bytes=40 * 200 * 2).sum().backward()
    products = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    assert [tuple(a) for a, b in products if b == [200, H]] == [(33, 200)] * 3 + [(32, 200)]
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::_to_copy"]
    assert [V, H] not in copies


@pytest.mark.parametrize("kept_rows", [0, 1, 13, 14, 100])
@pytest.mark.parametrize("wrt", [("log_probs",), DIFFERENTIABLE])
def test_any_number_of_rows_kept(implementation, device, kept_rows, wrt):
    for dtype in dtypes_of(device):
        hidden, weight, labels = make(device, dtype)
        check(hidden, weight, labels, dtype, wrt=wrt, kept_rows=kept_rows)


@pytest.mark.parametrize("wrt", [("log_probs",), ("log_probs", "entropy"), ("mean_logits",)])
def test_frozen_head(implementation, device, wrt):
    for dtype in dtypes_of(device):
        hidden, weight, labels = make(device, dtype)
        check(hidden, weight.detach(), labels, dtype, wrt=wrt)


def test_only_the_weight_is_trained(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    check(hidden.detach(), weight, labels, torch.float32)


@pytest.mark.parametrize(("n", "h", "v"), [(1, 8, 5), (2, 1, 9), (27, 13, 49153), (5, 16, 1)])
def test_shapes(implementation, device, n, h, v):
    hidden, weight, labels = make(device, torch.float32, n, h, v)
    labels[0] = v - 1
    check(hidden, weight, labels, torch.float32)


def test_leading_dimensions_and_strides(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    views = [
        (hidden.view(2, 11, H), weight, labels.view(2, 11)),
        (hidden.view(2, 11, H)[:, :-1], weight, labels.view(2, 11)[:, 1:]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), labels),
        (hidden[::2], weight[: V // 2], labels[::2] % (V // 2)),
    ]
    for x, w, y in views:
        ours = linear_log_probs(x, w, y, tile_bytes=3 * V * 4, cache_bytes=2 * V * 4)
        expected = reference(F.linear(x, w).double(), y).log_probs
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        upstream = torch.randn(y.shape, device=device)
        for one, two in zip(
            torch.autograd.grad(ours, (hidden, weight), upstream),
            torch.autograd.grad(expected, (hidden, weight), upstream.double()),
            strict=True,
        ):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kept_rows", "frozen", "wrt", "expected"),
    [
        (14, False, ("log_probs",), {"forward": 14, "hidden": 14, "weight": 14}),
        (14, False, DIFFERENTIABLE, {"forward": 14, "hidden": 14, "weight": 14}),
        (5, False, ("log_probs",), {"forward": 14 + 9, "hidden": 14, "weight": 14}),
        (0, False, ("log_probs",), {"forward": 28, "hidden": 14, "weight": 14}),
        (14, True, ("log_probs",), {"forward": 14, "hidden": 14, "weight": 0}),
    ],
)
def test_products_run_on_labelled_rows_and_on_kept_ones_once(device, kept_rows, frozen, wrt, expected):
    hidden, weight, labels = make(device, torch.float64)
    weight = weight.detach() if frozen else weight
    row = V * 8

    def step():
        out = linear_log_probs(
            hidden, weight, labels, outputs=LOG_PROB_OUTPUTS, tile_bytes=10**9, cache_bytes=kept_rows * row
        )
        sum(getattr(out, name).sum() for name in wrt).backward()

    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found = {"forward": 0, "hidden": 0, "weight": 0}
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            one, two = event.input_shapes[1:3] if "addmm" in event.name else event.input_shapes[:2]
            kind = "forward" if two == [H, V] else "hidden" if two == [V, H] else "weight"
            found[kind] += one[1] if kind == "weight" else one[0]
    assert found == expected


def test_without_grad_mode_one_product_runs_and_nothing_is_kept(device):
    hidden, weight, labels = make(device, torch.float32)
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        out = linear_log_probs(hidden, weight, labels, tile_bytes=10**9)
    assert out.grad_fn is None
    assert sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 1


def test_no_tensor_of_the_logits_size(implementation, device):
    hidden, weight, labels = make(device, torch.float32, n=40)

    def step(tile_rows, kept_rows, **options):
        with wide_tensors(V, rows=5, hidden_size=H) as found:
            row = V * 4
            out = linear_log_probs(
                hidden, weight, labels, tile_bytes=tile_rows * row, cache_bytes=kept_rows * row, **options
            )
            (out if isinstance(out, Tensor) else out.log_probs + out.entropy).sum().backward()
        return found

    assert not step(5, 5)
    assert not step(5, 5, outputs=("entropy",))
    assert step(5, 6)
    assert step(6, 5)


def test_all_rows_kept_need_no_wider_gradient(device):
    """The weight's gradient comes out of one product, rounded in its registers."""
    hidden, weight, labels = make(device, torch.bfloat16)
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_log_probs(hidden, weight, labels).sum().backward()
    shapes = [tuple(event.input_shapes[0]) for event in profile.events() if event.name == "aten::mm"]
    assert shapes == [(14, H), (14, V), (V, 14)]
    assert not [e for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes[0] == [V, H]]


@pytest.mark.parametrize("max_valid", [14, 17, N, N + 5])
def test_upper_bound_changes_nothing(implementation, device, max_valid):
    hidden, weight, labels = make(device, torch.float32)
    results = [linear_log_probs(hidden, weight, labels, max_valid=bound) for bound in (None, max_valid)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(each.sum(), (hidden, weight)) for each in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bound_too_small_is_nan_not_wrong(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    assert linear_log_probs(hidden, weight, labels, max_valid=13).isnan().all()


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_to_predict(implementation, device, n, frozen):
    hidden, weight, labels = make(device, torch.float32, n=n)
    labels.fill_(-100)
    weight.requires_grad_(not frozen)
    out = linear_log_probs(hidden, weight, labels, outputs=LOG_PROB_OUTPUTS)
    for each in out:
        assert each.shape == labels.shape and not each.any()
    leaves = [hidden] if frozen else [hidden, weight]
    for wrt in (out.log_probs, out.entropy):
        for gradient in torch.autograd.grad(wrt.sum(), leaves, retain_graph=True):
            assert not gradient.any()


def test_ignored_rows_do_not_count_even_where_not_finite(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    out = linear_log_probs(hidden, weight, labels, outputs=LOG_PROB_OUTPUTS)
    assert all(each.isfinite().all() for each in out)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out[0].sum(), (hidden, weight)))


def test_classes_of_logit_minus_infinity_have_no_part(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    labels = labels.where(labels < 0, labels % 100)
    bias = torch.zeros(V, device=device)
    bias[100:] = float("-inf")
    out = linear_log_probs(hidden, weight, labels, bias=bias, outputs=LOG_PROB_OUTPUTS)
    expected = linear_log_probs(hidden, weight[:100], labels, outputs=LOG_PROB_OUTPUTS)
    gradients = []
    for each in (out, expected):
        wrt = [each.log_probs, each.entropy, each.log_sum_sq_probs]
        gradients.append((*wrt, *torch.autograd.grad(sum(wrt).sum(), (hidden, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_first_of_equal_logits_is_top1(implementation, device):
    hidden = torch.ones(3, H, device=device)
    weight = torch.zeros(V, H, device=device)
    weight[[7, 90]] = 1
    labels = torch.tensor([7, 90, 3], device=device)
    out = linear_log_probs(hidden, weight, labels, outputs=("top1",))
    assert out.top1.tolist() == [True, False, False]


def test_fp16_gradients_of_small_weights_do_not_underflow(implementation, device):
    """Each token's 1/N over a vocabulary is far below fp16's smallest number."""
    if torch.float16 not in dtypes_of(device):
        pytest.skip("interpreted in fp32 only")
    hidden, weight, labels = make(device, torch.float16)
    for wrt in ("log_probs", "entropy"):
        out = linear_log_probs(hidden, weight, labels, outputs=LOG_PROB_OUTPUTS)
        gradients = torch.autograd.grad(getattr(out, wrt).sum() * 2**-24, (hidden, weight))
        exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
        expected = getattr(reference(F.linear(*exact), labels), wrt)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
            # The result is subnormal: right to half of the smallest number.
            torch.testing.assert_close(ours.double(), theirs * 2**-24, rtol=2e-3, atol=2**-25)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept_rows", [0, 4, 14])
def test_autocast(device, weight_dtype, kept_rows):
    hidden, weight, labels = make(device, torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        out = linear_log_probs(hidden, weight, labels, tile_bytes=3 * V * 2, cache_bytes=kept_rows * V * 2)
        expected = reference(F.linear(hidden, weight).float(), labels).log_probs
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(each.sum(), (hidden, weight)) for each in (out, expected)]
    for ours, theirs, each in zip(*gradients, (hidden, weight), strict=True):
        assert ours.dtype == each.dtype
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()
    if weight_dtype == torch.float32 and kept_rows < 14:  # not rounded on its way
        assert not torch.equal(gradients[0][1], gradients[0][1].bfloat16().float())


@pytest.mark.parametrize("options", [{"cache_bytes": 0}, {}, {"least_memory": True}], ids=str)
def test_products_wider_than_the_tensors(device, options):
    hidden, weight, labels = make(device, torch.bfloat16)
    out = linear_log_probs(hidden, weight, labels, compute_dtype=torch.float32, tile_bytes=3 * V * 4, **options)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected = reference(F.linear(*exact), labels).log_probs
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), (hidden, weight)), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()  # rounded once


def test_weight_gradient_accumulates_in_fp32(device):
    """256 tiles of equal rows: a bf16 sum would stop growing long before the last."""
    hidden = torch.ones(256, 16, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(4, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(256, device=device, dtype=torch.long)
    for cache_bytes in (0, 8 * 100, 10**6):
        out = linear_log_probs(hidden, weight, labels, tile_bytes=4 * 2, cache_bytes=cache_bytes)
        (gradient,) = torch.autograd.grad(-out.sum(), weight)
        expected = torch.tensor([-192.0, 64, 64, 64], device=device).unsqueeze(1).expand(4, 16)
        assert torch.equal(gradient.float(), expected)


def test_errors_name_the_argument(device):
    hidden, weight, labels = make(device, torch.float32)
    wrong = [
        (TypeError, "labels must be integers", {"labels": labels.float()}),
        (ValueError, r"weight must have shape \(V, 24\)", {"weight": weight[:, :5]}),
        (ValueError, "labels must have hidden's shape", {"labels": labels[1:]}),
        (ValueError, "bias must have shape", {"bias": weight[:5, 0]}),
        (ValueError, "temperature must be above 0", {"temperature": 0.0}),
        (ValueError, "softcap must be above 0", {"softcap": -1.0}),
        (ValueError, r"outputs must be among .* got \['entropie'\]", {"outputs": ["entropie"]}),
        (ValueError, "tile_bytes must be above 0", {"tile_bytes": 0}),
        (ValueError, "cache_bytes must be at least 0", {"cache_bytes": -1}),
        (TypeError, "weight must have hidden's dtype", {"weight": weight.bfloat16()}),
        (TypeError, "compute_dtype must be a floating point dtype", {"compute_dtype": torch.int32}),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            linear_log_probs(**{"hidden": hidden, "weight": weight, "labels": labels, **arguments})
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 131\)"):
            linear_log_probs(hidden, weight, labels + V)


def test_label_outside_the_vocabulary_is_nan(implementation, device):
    hidden, weight, labels = make(device, torch.float32)
    labels[1] = V
    out = torch.compile(linear_log_probs, backend="eager")(hidden, weight, labels)  # does not read the labels
    assert out[1].isnan() and out[2:].isfinite().all()
    assert all(gradient.isnan().any() for gradient in torch.autograd.grad(out.sum(), (hidden, weight)))


@pytest.mark.parametrize("retain_graph", [False, True])
def test_only_a_graph_that_is_not_kept_is_overwritten(device, monkeypatch, retain_graph):
    hidden, weight, labels = make(device, torch.float32)
    out = linear_log_probs(hidden, weight, labels, cache_bytes=5 * V * 4)
    rows, seen = linear_log_probs_module.log_prob_rows, []

    def recorded(logits, *args, gradient, **options):
        seen.append((len(logits), gradient.data_ptr() == logits.data_ptr()))
        return rows(logits, *args, gradient=gradient, **options)

    monkeypatch.setattr(linear_log_probs_module, "log_prob_rows", recorded)
    out.sum().backward(retain_graph=retain_graph)
    assert seen == [(5, not retain_graph), (9, True)]
