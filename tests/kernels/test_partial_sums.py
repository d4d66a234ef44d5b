"""Gradients of a norm's weight and bias from more programs than one step of the kernel that sums their shares."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liger_trainer.kernels import _norm_kernels, layer_norm

from .helpers import assert_close_to_reference, doubled, rounded


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_every_share_is_added(implementation, device, monkeypatch):
    monkeypatch.setattr(_norm_kernels, "multiprocessors", lambda _: 100)
    n_rows, width = 150, 2048  # a row a program: more rows than _SUM_TILE has, on any machine
    assert n_rows > _norm_kernels._SUM_TILE[1]
    x, dy = (rounded(n_rows, width, device=device, dtype=torch.float32, seed=seed) for seed in (0, 1))
    weight, bias = (rounded(width, device=device, dtype=torch.float32, seed=seed) for seed in (2, 3))
    found = torch.autograd.grad(layer_norm(x, weight, bias), (weight, bias), dy)
    exact = [doubled(each) for each in (x, weight, bias)]
    y = F.layer_norm(exact[0], (width,), exact[1], exact[2])
    expected = torch.autograd.grad(y, exact[1:], doubled(dy))
    for ours, truth in zip(found, expected, strict=True):
        assert_close_to_reference(ours, truth, torch.float32, magnitude=n_rows**0.5)
