"""Rows with a label come first, in their order, also where there are more rows than the kernel takes at a time."""

from __future__ import annotations

import pytest
import torch

from liger_trainer.kernels._tiles import partition_rows


@pytest.mark.parametrize("n_rows", [1, 1023, 1024, 2500])
def test_labels_come_first(implementation, device, n_rows):
    labels = torch.randint(7, (n_rows,), generator=torch.Generator().manual_seed(n_rows))
    labels = labels.masked_fill(labels > 3, -100)
    labels[0] = -100
    rows, n_valid = partition_rows(labels.to(device), -100, None, use_kernel=implementation == "triton")
    valid = (labels != -100).nonzero().flatten()
    assert n_valid == len(valid)
    assert rows is not None
    assert rows[:n_valid].tolist() == valid.tolist()
    assert sorted(rows.tolist()) == list(range(n_rows))
