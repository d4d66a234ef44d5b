"""What only a GPU shows of linear_cross_entropy: memory at real shapes, fp16 under a loss scale, no host sync."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.kernels import cross_entropy, linear_cross_entropy, linear_log_probs

N, H, V = 8192, 4096, 128256
MIB = 2**20


def real_shape(requires_weight_gradient: bool = True):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(0.02)
    labels = torch.randint(V, (N,), device="cuda", generator=generator)
    return hidden, weight.requires_grad_(requires_weight_gradient), labels


def peak_over_inputs_and_gradients(hidden, weight, labels, tile_bytes):
    # Workspaces of the matrix products are allocated once and are not the op's.
    linear_cross_entropy(hidden, weight, labels, tile_bytes=tile_bytes).backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels, tile_bytes=tile_bytes).backward()
    torch.cuda.synchronize()
    gradients = sum(each.grad.nbytes for each in (hidden, weight) if each.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


def test_peak_memory_with_a_trained_head():
    assert peak_over_inputs_and_gradients(*real_shape(), 512 * MIB) < 1.05 * (V * H * 4 + 512 * MIB)


def test_peak_memory_with_a_frozen_head():
    assert peak_over_inputs_and_gradients(*real_shape(False), 160 * MIB) < 0.3e9


def test_peak_memory_with_an_adapter_on_a_frozen_head():
    hidden, weight, labels = real_shape(False)
    generator = torch.Generator("cuda").manual_seed(1)
    a, b = (
        torch.randn(n, 16, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_() for n in (N, V)
    )
    for op in (linear_cross_entropy, linear_log_probs):
        options = {"tile_bytes": 160 * MIB} | ({"cache_bytes": 0} if op is linear_log_probs else {})
        for _ in range(2):  # workspaces of the products are there the second time
            hidden.grad = a.grad = b.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            op(hidden, weight, labels, low_rank=(a, b), **options).mean().backward()
            torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes < 0.3e9
        assert weight.grad is None


def test_peak_memory_of_an_evaluation():
    hidden, weight, labels = real_shape()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * 512 * MIB
    assert torch.cuda.memory_allocated() - before < MIB
    assert loss.isfinite()


def test_no_host_sync_in_forward_and_backward():
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1000, (300,), device="cuda")
    labels[::2] = -100
    tokens = torch.tensor(150.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, num_items=tokens, max_valid=150).backward()
        cross_entropy(torch.randn(300, 1000, device="cuda", requires_grad=True), labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_label_out_of_range_is_nan_and_reads_nothing_outside(op):
    hidden = torch.randn(4, 16, device="cuda", requires_grad=True)
    weight = torch.randn(33, 16, device="cuda", requires_grad=True)
    labels = torch.tensor([1, 33, 2**40, -5], device="cuda")

    def loss(**options):
        if op == "cross_entropy":
            return cross_entropy(F.linear(hidden, weight), labels, **options)
        return linear_cross_entropy(hidden, weight, labels, **options)

    assert loss().isnan()
    assert loss(reduction="none").isnan().tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 33\)"):
        loss(check_labels=True)


def test_fp16_under_a_loss_scale():
    """65536 / N of a probability near 1/V is representable in fp16; 1/N of it is not."""
    n, h, v = 16384, 256, V
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, h, device="cuda", generator=generator).half().requires_grad_()
    weight = (torch.randn(v, h, device="cuda", generator=generator) / h**0.5).half().requires_grad_()
    labels = torch.randint(v, (n,), device="cuda", generator=generator)
    scaler = torch.amp.GradScaler(init_scale=65536.0)
    ours = torch.autograd.grad(scaler.scale(linear_cross_entropy(hidden, weight, labels)), (hidden, weight))
    eager = torch.autograd.grad(
        scaler.scale(F.cross_entropy(F.linear(hidden, weight).float(), labels)), (hidden, weight)
    )
    # float64 in slices, since the whole would not fit
    exact_hidden, exact_weight = torch.zeros(n, h, device="cuda").double(), torch.zeros(v, h, device="cuda").double()
    w = weight.detach().double()
    for rows in torch.arange(n, device="cuda").split(1024):
        x = hidden.detach()[rows].double()
        d = (x @ w.t()).softmax(-1)
        d[torch.arange(len(rows)), labels[rows]] -= 1
        d *= 65536.0 / n
        exact_hidden[rows] = d @ w
        exact_weight += d.t() @ x
    for mine, theirs, exact in zip(ours, eager, (exact_hidden, exact_weight), strict=True):
        error, eager_error = ((each.double() - exact).norm() / exact.norm() for each in (mine, theirs))
        assert error < 2e-3
        assert error < 1.5 * eager_error
