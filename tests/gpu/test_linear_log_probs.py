"""What only a GPU shows of linear_log_probs and linear_jsd: memory at real shapes."""

from __future__ import annotations

import torch

from liger_trainer.kernels import linear_jsd, linear_log_probs

N, H, V = 8192, 4096, 128256
MIB = 2**20


def normal(*shape, seed, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(scale)


def real_shape(n=N):
    hidden, weight = normal(n, H, seed=0).requires_grad_(), normal(V, H, seed=1, scale=0.02).requires_grad_()
    labels = torch.randint(V, (n,), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    return hidden, weight, labels


def peak_over_inputs(function, leaves):
    """Bytes above what is there before, gradients included."""
    for _ in range(2):  # workspaces of the matrix products are allocated once and are not the op's
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function().backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_all_kept_has_no_wider_gradient():
    hidden, weight, labels = real_shape()
    peak = peak_over_inputs(lambda: linear_log_probs(hidden, weight, labels, max_valid=N).sum(), (hidden, weight))
    assert peak < 1.05 * (N * V * 2 + weight.nbytes + hidden.nbytes)


def test_a_bounded_cache():
    hidden, weight, labels = real_shape()
    peak = peak_over_inputs(
        lambda: linear_log_probs(
            hidden, weight, labels, max_valid=N, cache_bytes=512 * MIB, tile_bytes=512 * MIB
        ).sum(),
        (hidden, weight),
    )
    assert peak < 1.05 * (2 * weight.nbytes + max(512 * MIB, weight.nbytes) + 512 * MIB + hidden.nbytes)


def test_least_memory():
    hidden, weight, labels = real_shape()
    peak = peak_over_inputs(
        lambda: linear_log_probs(hidden, weight, labels, max_valid=N, least_memory=True).sum(), (hidden, weight)
    )
    assert peak < 1.05 * (weight.nbytes + 3 * hidden.nbytes + 128 * MIB)  # hidden's gradient in fp32, then in bf16


def test_least_memory_and_a_cache():
    hidden, weight, labels = real_shape()
    peak = peak_over_inputs(
        lambda: linear_log_probs(hidden, weight, labels, max_valid=N, least_memory=True, cache_bytes=512 * MIB).sum(),
        (hidden, weight),
    )
    assert peak < 1.05 * (weight.nbytes + 3 * hidden.nbytes + 640 * MIB)


def test_a_frozen_head_and_an_evaluation():
    hidden, weight, labels = real_shape()
    frozen = weight.detach()
    peak = peak_over_inputs(
        lambda: linear_log_probs(hidden, frozen, labels, max_valid=N, tile_bytes=256 * MIB).sum(), (hidden,)
    )
    assert peak < 1.1 * (256 * MIB + 2 * hidden.nbytes)
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_log_probs(hidden, weight, labels, max_valid=N, tile_bytes=256 * MIB)
        assert torch.cuda.max_memory_allocated() - before < 1.1 * 256 * MIB


def test_two_heads():
    rows, width = 4096, 2048
    student, student_weight = normal(rows, width, seed=0).requires_grad_(), normal(V, width, seed=1, scale=0.02)
    student_weight.requires_grad_()
    teacher, teacher_weight = normal(rows, H, seed=2), normal(V, H, seed=3, scale=0.02)
    peak = peak_over_inputs(
        lambda: linear_jsd(student, student_weight, teacher, teacher_weight), (student, student_weight)
    )
    assert peak < 2.1e9
