"""The low-rank term of a head, an adapter's, against float64 logits: every op, what is frozen, and what is made."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from wide_tensors import MadeTensors

from liger_trainer.kernels import linear_cross_entropy, linear_jsd, linear_log_probs

from .divergence_reference import reference_divergence
from .helpers import dtypes_of
from .loss_reference import assert_product_close, reference_loss

N, H, V, R = 22, 24, 131, 5
NAMES = ("hidden", "weight", "bias", "a", "b")
TRAINED = {  # which of NAMES want a gradient
    "adapter": (True, False, False, True, True),
    "second layer": (False, False, False, False, True),
    "first layer": (True, False, False, True, False),
    "all": (True,) * 5,
}
TRANSFORMS = {"plain": {}, "softcap": {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}}


def make(device, dtype, trained: str = "all", bias: bool = True, n: int = N) -> tuple[dict[str, Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = {"hidden": (n, H), "weight": (V, H), "bias": (V,), "a": (n, R), "b": (V, R)}
    scale = {"weight": H**-0.5, "b": 0.7 * R**-0.5}
    tensors: dict[str, Tensor | None] = {}
    for name, wants in zip(NAMES, TRAINED[trained], strict=True):
        values = scale.get(name, 1.0) * torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        tensors[name] = values.to(device, dtype).requires_grad_(wants)
    if not bias:
        tensors["bias"] = None
    labels = torch.randint(V, (n,), generator=generator)
    labels[::2] = -100
    return tensors, labels.to(device)


def exactly(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: None if each is None else each.detach().double().cpu().requires_grad_(each.requires_grad)
        for name, each in tensors.items()
    }


def logits_of(tensors, dtype: torch.dtype = torch.float64) -> Tensor:
    def rounded(x: Tensor) -> Tensor:
        return x + (x.to(dtype) - x).detach()

    small = F.linear(tensors["a"], tensors["b"], tensors["bias"])
    return rounded(F.linear(tensors["hidden"], tensors["weight"]) + rounded(small))


def compare(found, expected, tensors, exact, dtype) -> None:
    """Results, and gradients under random upstream ones."""
    assert_product_close(found, expected, dtype)
    names = [name for name, each in tensors.items() if each is not None and each.requires_grad]
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, [tensors[name] for name in names], upstream.to(found))
    theirs = torch.autograd.grad(expected, [exact[name] for name in names], upstream.double())
    for name, one, two in zip(names, ours, theirs, strict=True):
        assert one.dtype == tensors[name].dtype, name
        assert_product_close(one, two, dtype)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_cross_entropy(implementation, device, trained, reduction, name, bias):
    for dtype in dtypes_of(device):
        tensors, labels = make(device, dtype, trained, bias)
        hidden, weight, offsets, *low_rank = tensors.values()
        found = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=offsets,
            low_rank=tuple(low_rank),
            reduction=reduction,
            tile_bytes=3 * V * dtype.itemsize,
            **TRANSFORMS[name],
        )
        exact = exactly(tensors)
        expected = reference_loss(logits_of(exact), labels.cpu(), reduction=reduction, **TRANSFORMS[name])
        compare(found, expected, tensors, exact, dtype)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [{"kept_rows": 0}, {"kept_rows": 4}, {"kept_rows": 50}, {"least_memory": True}])
def test_log_probs(implementation, device, trained, name, options):
    options = dict(options)
    for dtype in dtypes_of(device):
        tensors, labels = make(device, dtype, trained)
        hidden, weight, offsets, *low_rank = tensors.values()
        row = V * dtype.itemsize
        memory = {"cache_bytes": options["kept_rows"] * row} if "kept_rows" in options else options
        for outputs in ((), ("entropy",)):
            found = linear_log_probs(
                hidden,
                weight,
                labels,
                bias=offsets,
                low_rank=tuple(low_rank),
                outputs=outputs,
                tile_bytes=3 * row,
                **memory,
                **TRANSFORMS[name],
            )
            exact = exactly(tensors)
            logits = logits_of(exact, dtype)
            expected = -reference_loss(logits, labels.cpu(), reduction="none", **TRANSFORMS[name])
            if outputs:
                z = logits * TRANSFORMS[name].get("logit_scale", 1.0)
                cap = TRANSFORMS[name].get("softcap")
                z = (z if cap is None else cap * torch.tanh(z / cap)) / TRANSFORMS[name].get("temperature", 1.0)
                entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).where(labels.cpu() != -100, 0)
                found, expected = torch.stack([found.log_probs, found.entropy]), torch.stack([expected, entropy])
            compare(found, expected, tensors, exact, dtype)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergence(implementation, device, trained, reduction):
    for dtype in dtypes_of(device):
        student, labels = make(device, dtype, trained)
        teacher = {name: None if each is None else each.detach().flip(0) for name, each in student.items()}
        arguments = {}
        for prefix, tensors in (("student_", student), ("teacher_", teacher)):
            arguments |= {f"{prefix}{name}": tensors[name] for name in ("hidden", "weight", "bias")}
            arguments[f"{prefix}low_rank"] = (tensors["a"], tensors["b"])
        found = linear_jsd(
            **arguments, labels=labels, beta=0.3, reduction=reduction, tile_bytes=2 * 3 * V * dtype.itemsize
        )
        exact = exactly(student)
        logits = logits_of(exact, dtype), logits_of(exactly(teacher), dtype)
        expected = reference_divergence(*logits, labels=labels.cpu(), beta=0.3, reduction=reduction)
        compare(found, expected, student, exact, dtype)


OPS = {
    "cross entropy": (linear_cross_entropy, {}),
    "of rows": (linear_cross_entropy, {"reduction": "none"}),
    "recomputed": (linear_log_probs, {"cache_bytes": 0}),
    "kept": (linear_log_probs, {}),
    "least memory": (linear_log_probs, {"least_memory": True}),
}


@pytest.mark.parametrize("name", OPS)
def test_no_tensor_of_the_weights_size_is_made(device, name):
    """Neither a merged weight nor a stacked one nor a gradient of the frozen one, all rows of logits neither."""
    op, options = OPS[name]

    def largest(trained: str) -> int:
        tensors, labels = make(device, torch.float64, trained, bias=False)
        hidden, weight, _, *low_rank = tensors.values()
        with MadeTensors() as made:
            op(hidden, weight, labels, low_rank=tuple(low_rank), tile_bytes=4 * V * 8, **options).sum().backward()
        return max(made.elements)

    kept = 11 * V if name == "kept" else 0
    assert largest("adapter") <= max(4 * V, kept, V * R)
    assert largest("all") >= V * H


def test_kept_logits_are_bounded_where_no_buffer_pays_for_them(device, monkeypatch):
    """A weight trained in bf16 has a buffer in fp32, in whose place all logits may be kept; a frozen one has none."""
    module = sys.modules[linear_log_probs.__module__]
    monkeypatch.setattr(module, "_CACHE_BYTES", 3 * V * 2)
    for trained, rows in (("adapter", 3), ("all", 11)):
        tensors, labels = make(device, torch.bfloat16, trained, bias=False)
        hidden, weight, _, *low_rank = tensors.values()
        with MadeTensors() as made:
            linear_log_probs(hidden, weight, labels, low_rank=tuple(low_rank), tile_bytes=2 * V * 2)
        assert (rows, V) in made.shapes


def test_second_weight_accumulates_in_fp32(device):
    """256 tiles of equal rows: a bf16 sum would stop growing long before the last."""
    a = torch.ones(256, 4, device=device, dtype=torch.bfloat16)
    b = torch.zeros(4, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    hidden, weight = torch.ones(256, 16, device=device).bfloat16(), torch.zeros(4, 16, device=device).bfloat16()
    labels = torch.zeros(256, device=device, dtype=torch.long)
    expected = torch.tensor([-192.0, 64, 64, 64], device=device).unsqueeze(1).expand(4, 4)
    for loss in (
        linear_cross_entropy(hidden, weight, labels, low_rank=(a, b), reduction="sum", tile_bytes=4 * 2),
        -linear_log_probs(hidden, weight, labels, low_rank=(a, b), cache_bytes=0, tile_bytes=4 * 2).sum(),
    ):
        assert torch.equal(torch.autograd.grad(loss, b)[0].float(), expected)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_adapters_of_another_dtype(device, adapter):
    """peft keeps its adapters in fp32 beside a model in bf16."""
    tensors, labels = make(device, torch.bfloat16, "adapter", n=200)
    a, b = (tensors[name].detach().to(adapter).requires_grad_() for name in ("a", "b"))
    tensors |= {"a": a, "b": b}
    exact = exactly(tensors)
    expected = reference_loss(logits_of(exact), labels.cpu())
    for autocast in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            found = linear_cross_entropy(
                tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"], low_rank=(a, b)
            )
        gradients = torch.autograd.grad(found, (tensors["hidden"], a, b))
        theirs = torch.autograd.grad(expected, [exact[name] for name in ("hidden", "a", "b")], retain_graph=True)
        assert_product_close(found, expected, torch.bfloat16)
        for one, two, dtype in zip(gradients, theirs, (torch.bfloat16, adapter, adapter), strict=True):
            assert one.dtype == dtype
            assert_product_close(one, two, torch.bfloat16)
        if adapter == torch.float32:  # not rounded on its way
            assert not torch.equal(gradients[2], gradients[2].bfloat16().float())


def test_gradients_accumulate_over_two_steps(implementation, device):
    tensors, labels = make(device, torch.float32, "adapter")
    hidden, weight, bias, a, b = tensors.values()
    exact = exactly(tensors)
    for _ in range(2):
        options = {"bias": bias, "low_rank": (a, b), "num_items": 30}
        linear_cross_entropy(hidden, weight, labels, tile_bytes=3 * V * 4, **options).backward()
        reference_loss(logits_of(exact), labels.cpu(), num_items=30).backward()
    for name in ("hidden", "a", "b"):
        assert_product_close(tensors[name].grad, exact[name].grad, torch.float32)
    assert weight.grad is None


def test_leading_dimensions_and_strides(implementation, device):
    tensors, labels = make(device, torch.float32, n=20)
    hidden, weight, bias, a, b = tensors.values()
    both = torch.cat([a, hidden], -1).view(2, 10, -1)  # both as columns of one tensor
    found = linear_cross_entropy(
        both[:, 1:, R:], weight, labels.view(2, 10)[:, 1:], bias=bias, low_rank=(both[:, 1:, :R], b), tile_bytes=4 * V
    )
    kept = [each.view(2, 10, -1)[:, 1:].flatten(0, 1) for each in (hidden, a)]
    logits = F.linear(kept[0], weight, bias) + kept[1] @ b.t()
    expected = F.cross_entropy(logits, labels.view(2, 10)[:, 1:].flatten())
    torch.testing.assert_close(found, expected)
    for one, two in zip(
        *(torch.autograd.grad(each, list(tensors.values())) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b: a, TypeError, r"low_rank must be a pair of tensors, \(\*, r\) and \(V, r\); got Tensor"),
        (lambda a, b: (a, None), TypeError, r"low_rank\[1\] must be a tensor, got None"),
        (lambda a, b: (a.long(), b), TypeError, r"low_rank\[0\] must have a floating point dtype"),
        (lambda a, b: (a[1:], b), ValueError, r"low_rank\[0\] must have shape \(22, r\).*got \(21, 5\)"),
        (lambda a, b: (a, b[:, 1:]), ValueError, r"low_rank\[1\] must have shape \(131, 5\).*got \(131, 4\)"),
        (lambda a, b: (a, b.to("meta")), ValueError, r"low_rank\[1\] is on meta"),
    ],
)
def test_what_does_not_fit_is_named(device, change, error, message):
    tensors, labels = make(device, torch.float32)
    hidden, weight, _, a, b = tensors.values()
    for op in (linear_cross_entropy, linear_log_probs):
        with pytest.raises(error, match=message):
            op(hidden, weight, labels, low_rank=change(a, b))
    with pytest.raises(error, match=f"student_{message}"):
        linear_jsd(hidden, weight, hidden, weight, student_low_rank=change(a, b))
    with pytest.raises(error, match=f"teacher_{message}"):
        linear_jsd(hidden, weight, hidden, weight, teacher_low_rank=change(a, b))
