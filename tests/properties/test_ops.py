"""Every op on shapes, strides, masks, dtypes and options that hypothesis chooses, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from liger_trainer.kernels import (
    add_rms_norm,
    cross_entropy,
    geglu,
    jsd,
    kl_div,
    layer_norm,
    linear_cross_entropy,
    linear_jsd,
    linear_log_probs,
    rms_norm,
    rotary,
    swiglu,
)
from tests.kernels.divergence_reference import reference_divergence
from tests.kernels.loss_reference import reference_loss

from .strategies import LAYOUTS, draw_labels, leading_shapes, normal, thorough, widths

pytestmark = pytest.mark.usefixtures("implementation")

seeds = st.integers(0, 2**16)
layouts = st.sampled_from(sorted(LAYOUTS))
# Relative error in the 2-norm. A norm's gradient and a loss over few rows are sums with cancellation.
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.2e-2}


@pytest.fixture
def dtypes(implementation: str, device: torch.device) -> Sequence[torch.dtype]:
    """Triton has no float64 kernels, and its interpreter is wrong about bf16."""
    if implementation == "torch":
        return torch.float64, torch.float32, torch.bfloat16
    return (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)


def compare(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Results, and gradients under a random upstream gradient."""
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    kept = [leaf.detach().clone() for leaf in leaves]
    found, expected = op(*leaves), reference(*exact)
    found = (found,) if isinstance(found, Tensor) else found
    expected = (expected,) if isinstance(expected, Tensor) else expected
    generator = torch.Generator().manual_seed(3)
    # Exact in the result's dtype, so that both get the same.
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in found]
    gradients = torch.autograd.grad(found, leaves, [u.to(y.device) for u, y in zip(upstream, found)], allow_unused=True)
    truths = torch.autograd.grad(expected, exact, [u.double() for u in upstream], allow_unused=True)
    for leaf, before in zip(leaves, kept):
        assert torch.equal(leaf, before), "an input was written to"
    for ours, truth in zip((*found, *gradients), (*expected, *truths), strict=True):
        if truth is None:
            continue
        assert ours is not None and ours.shape == truth.shape
        ours = ours.detach().double().cpu()
        assert ours.isfinite().all()
        # Where all cancels (a norm of one number, a softmax of one class) rounding is all there is.
        size = torch.maximum(truth.norm(), torch.tensor(1.0 if truth.numel() == 1 else 0.3 * truth.numel() ** 0.5))
        assert (ours - truth).norm() <= LIMITS[dtype] * size, f"{(ours - truth).norm() / size:.2g}"


@thorough
@given(data=st.data(), lead=leading_shapes, width=widths, layout=layouts, seed=seeds)
def test_norms(data, dtypes, device, lead, width, layout, seed):
    dtype = data.draw(st.sampled_from(dtypes))
    offset, eps = data.draw(st.sampled_from([0.0, 1.0])), data.draw(st.sampled_from([1e-6, 1e-2]))
    weighted = data.draw(st.booleans())
    which = data.draw(st.sampled_from(["rms_norm", "add_rms_norm", "layer_norm"]))
    casting = data.draw(st.sampled_from(["llama", "gemma", "none"]))
    x = normal(*lead, width, seed=seed, dtype=dtype, device=device, layout=layout)
    weight = normal(width, seed=seed + 1, dtype=dtype, device=device) if weighted else None
    weights = [] if weight is None else [weight]

    def exact_rms(x, weight=None):
        scale = 1.0 if weight is None else weight + offset
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    if which == "rms_norm":
        options = {"offset": offset, "casting": casting}
        compare(lambda x, w=None: rms_norm(x, w, eps, **options), exact_rms, [x, *weights], dtype)
    elif which == "layer_norm":
        bias = normal(width, seed=seed + 2, dtype=dtype, device=device)
        compare(
            lambda x, b, w=None: layer_norm(x, w, b, eps),
            lambda x, b, w=None: F.layer_norm(x, (width,), w, b, eps),
            [x, bias, *weights],
            dtype,
        )
    else:
        residual = normal(*lead, width, seed=seed + 2, dtype=dtype, device=device)

        def exact_sum(x, residual, weight=None):
            total = x + residual
            # The sum is rounded before its norm; its gradient is the unrounded one's.
            total = total + (total.detach().to(dtype).double() - total.detach())
            return exact_rms(total, weight), total

        options = {"offset": offset, "casting": casting}
        compare(lambda x, r, w=None: add_rms_norm(x, r, w, eps, **options), exact_sum, [x, residual, *weights], dtype)


@thorough
@given(data=st.data(), lead=leading_shapes, width=widths, gate_layout=layouts, up_layout=layouts, seed=seeds)
def test_gated_activations(data, dtypes, device, lead, width, gate_layout, up_layout, seed):
    dtype = data.draw(st.sampled_from(dtypes))
    gate = normal(*lead, width, seed=seed, dtype=dtype, device=device, layout=gate_layout)
    up = normal(*lead, width, seed=seed + 1, dtype=dtype, device=device, layout=up_layout)
    approximate = data.draw(st.sampled_from([None, "tanh", "none"]))
    if approximate is None:
        compare(swiglu, lambda g, u: F.silu(g) * u, [gate, up], dtype)
    else:
        compare(
            lambda g, u: geglu(g, u, approximate),
            lambda g, u: F.gelu(g, approximate=approximate) * u,
            [gate, up],
            dtype,
        )


@thorough
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5)]),
    pairs=st.integers(1, 17),
    rest=st.sampled_from([0, 1, 6]),
    interleaved=st.booleans(),
    token_major=st.booleans(),
    seed=seeds,
)
def test_rotary(data, dtypes, device, batch, tokens, heads, pairs, rest, interleaved, token_major, seed):
    dtype = data.draw(st.sampled_from(dtypes))
    shared = data.draw(st.booleans())
    q, k = (
        normal(batch, tokens, n, 2 * pairs + rest, seed=seed + n, dtype=dtype, device=device, layout=data.draw(layouts))
        for n in heads
    )
    if not token_major:
        q, k = (each.detach().transpose(1, 2).requires_grad_() for each in (q, k))
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(1 if shared else batch, tokens, 2 * pairs, generator=generator, dtype=torch.float64)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    unsqueeze_dim = 2 if token_major else 1

    def rotate(x):
        c, s = cos.double().cpu().unsqueeze(unsqueeze_dim), sin.double().cpu().unsqueeze(unsqueeze_dim)
        turned, kept = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if interleaved:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-turned[..., pairs:], turned[..., :pairs]), -1)
        return torch.cat((turned * c + other * s, kept), -1)

    options = {"interleaved": interleaved, "unsqueeze_dim": unsqueeze_dim}
    compare(lambda q, k: rotary(q, k, cos, sin, **options), lambda q, k: (rotate(q), rotate(k)), [q, k], dtype)


loss_options = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "softcap": st.sampled_from([None, 2.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.3]),
        "label_smoothing": st.sampled_from([0.0, 0.2]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
    }
)


@thorough
@given(
    data=st.data(),
    rows=st.integers(1, 9),
    classes=st.sampled_from([2, 5, 16, 33, 131, 257]),
    options=loss_options,
    layout=st.sampled_from(["contiguous", "half_rows"]),
    seed=seeds,
)
def test_cross_entropy(data, dtypes, device, rows, classes, options, layout, seed):
    dtype = data.draw(st.sampled_from(dtypes))
    labels = data.draw(draw_labels(rows, classes))
    logits = normal(rows, classes, seed=seed, dtype=dtype, device=device, layout=layout)
    compare(
        lambda logits: cross_entropy(logits, labels.to(device), **options),
        lambda logits: reference_loss(logits, labels, **options),
        [logits],
        dtype,
    )


@pytest.fixture
def head_dtypes(dtypes: Sequence[torch.dtype]) -> Sequence[torch.dtype]:
    """Without bf16, whose rounding of the logits the formula would have to imitate."""
    return [dtype for dtype in dtypes if dtype != torch.bfloat16]


def draw_low_rank(data, rows, classes, seed, dtype, device):
    """Hidden states and weight of an adapter's term, or of none."""
    rank = data.draw(st.sampled_from([0, 1, 3]))
    return [normal(n, rank, seed=seed + i, dtype=dtype, device=device) for i, n in ((2, rows), (3, classes)) if rank]


def head_logits(hidden, weight, *term):
    return hidden @ weight.T + (term[0] @ term[1].T if term else 0)


@thorough
@given(
    data=st.data(),
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 8, 13]),
    classes=st.sampled_from([2, 5, 33, 131]),
    options=loss_options,
    tile_rows=st.integers(1, 4),
    temperature=st.sampled_from([1.0, 1.7]),
    seed=seeds,
)
def test_linear_cross_entropy(data, head_dtypes, device, rows, width, classes, options, tile_rows, temperature, seed):
    dtype = data.draw(st.sampled_from(head_dtypes))
    labels = data.draw(draw_labels(rows, classes))
    hidden = normal(rows, width, seed=seed, dtype=dtype, device=device)
    weight, bias = (normal(classes, *s, seed=seed + 1, dtype=dtype, device=device) for s in ((width,), ()))
    options = {**options, "temperature": temperature}
    if options["reduction"] == "mean" and data.draw(st.booleans()):
        options["num_items"] = data.draw(st.sampled_from([1.0, 7.0]))
    term = draw_low_rank(data, rows, classes, seed, dtype, device)
    sizes = {"tile_bytes": tile_rows * classes * dtype.itemsize}
    if data.draw(st.booleans()):
        sizes["max_valid"] = int((labels != -100).sum()) + data.draw(st.integers(0, rows - int((labels != -100).sum())))
    compare(
        lambda h, w, b, *term: linear_cross_entropy(
            h, w, labels.to(device), bias=b, low_rank=term or None, **options, **sizes
        ),
        lambda h, w, b, *term: reference_loss(head_logits(h, w, *term) + b, labels, **options),
        [hidden, weight, bias, *term],
        dtype,
    )


@thorough
@given(
    data=st.data(),
    rows=st.integers(1, 9),
    classes=st.sampled_from([2, 5, 33, 131]),
    tile_rows=st.integers(1, 4),
    cached_rows=st.integers(0, 9),
    least_memory=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    seed=seeds,
)
def test_linear_log_probs(
    data, head_dtypes, device, rows, classes, tile_rows, cached_rows, least_memory, softcap, seed
):
    dtype = data.draw(st.sampled_from(head_dtypes))
    labels = data.draw(draw_labels(rows, classes))
    hidden, weight = (normal(n, 8, seed=seed + i, dtype=dtype, device=device) for i, n in enumerate((rows, classes)))
    term = draw_low_rank(data, rows, classes, seed, dtype, device)
    row_bytes = classes * dtype.itemsize
    valid = labels != -100

    def op(h, w, *term):
        found = linear_log_probs(
            h, w, labels.to(device), low_rank=term or None, softcap=softcap, least_memory=least_memory,
            outputs=("entropy", "mean_logits", "log_sum_sq_probs"),
            tile_bytes=tile_rows * row_bytes, cache_bytes=cached_rows * row_bytes,
        )  # fmt: skip
        return found.log_probs, found.entropy, found.mean_logits, found.log_sum_sq_probs

    def reference(h, w, *term):
        z = head_logits(h, w, *term)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = z.log_softmax(-1)
        of_label = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        each = (of_label, -(log_p.exp() * log_p).sum(-1), z.mean(-1), (2 * log_p).logsumexp(-1))
        return tuple(values.where(valid, 0) for values in each)

    compare(op, reference, [hidden, weight, *term], dtype)


@thorough
@given(
    data=st.data(),
    rows=st.integers(1, 7),
    classes=st.sampled_from([2, 5, 33, 131]),
    beta=st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    temperature=st.sampled_from([1.0, 2.5]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    tile_rows=st.integers(2, 6),
    fused=st.booleans(),
    seed=seeds,
)
def test_divergences(data, head_dtypes, device, rows, classes, beta, temperature, reduction, tile_rows, fused, seed):
    dtype = data.draw(st.sampled_from(head_dtypes))
    labels = data.draw(draw_labels(rows, classes))
    options = {"beta": beta, "temperature": temperature, "reduction": reduction}
    if not fused:
        student = normal(rows, classes, seed=seed, dtype=dtype, device=device)
        teacher = normal(rows, classes, seed=seed + 1, dtype=dtype, device=device).detach()
        compare(
            lambda s: jsd(s, teacher, labels=labels.to(device), **options),
            lambda s: reference_divergence(s, teacher.double().cpu(), labels=labels, **options),
            [student],
            dtype,
        )
        return
    student, weight = (normal(n, 8, seed=seed + i, dtype=dtype, device=device) for i, n in enumerate((rows, classes)))
    teacher, theirs = (
        normal(n, 5, seed=seed + i, dtype=dtype, device=device).detach() for i, n in ((2, rows), (3, classes))
    )
    tile_bytes = tile_rows * classes * dtype.itemsize
    compare(
        lambda s, w: linear_jsd(s, w, teacher, theirs, labels=labels.to(device), tile_bytes=tile_bytes, **options),
        lambda s, w: reference_divergence(
            s @ w.T, (teacher.double() @ theirs.double().T).cpu(), labels=labels, **options
        ),
        [student, weight],
        dtype,
    )


@thorough
@given(
    data=st.data(),
    lead=leading_shapes,
    width=widths,
    reduction=st.sampled_from(["batchmean", "sum", "mean", "none"]),
    log_target=st.booleans(),
    seed=seeds,
)
def test_kl_div(data, head_dtypes, device, lead, width, reduction, log_target, seed):
    dtype = data.draw(st.sampled_from(head_dtypes))
    log_probs = normal(*lead, width, seed=seed, dtype=dtype, device=device).detach().log_softmax(-1).requires_grad_()
    target = normal(*lead, width, seed=seed + 1, dtype=dtype, device=device).detach()
    target = target.log_softmax(-1) if log_target else target.softmax(-1)
    options = {"reduction": reduction, "log_target": log_target}
    compare(
        lambda x: kl_div(x, target, **options),
        lambda x: F.kl_div(x, target.double().cpu(), **options),
        [log_probs],
        dtype,
    )
