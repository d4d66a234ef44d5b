"""Rows of strided tensors: which of them are read in place, and that none is mistaken for another."""

from __future__ import annotations

import pytest
import torch

from liger_trainer.kernels._rows import as_matrix, as_rows, empty_in_order, from_rows, memory_order

from .helpers import strided_views

VIEWS = strided_views(lambda *shape: torch.randn(shape))
IN_PLACE = {
    "half_of_each_row",
    "heads_from_tokens",
    "half_of_heads_from_tokens",
    "tokens_before_batch",
    "every_other_row",
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_found_in_place_and_put_back(name):
    x = VIEWS[name]
    order = memory_order(x)
    rows, stride = as_rows(x, order)
    assert (rows.data_ptr() == x.data_ptr()) == (name in IN_PLACE)
    flat = torch.as_strided(rows, (30, 8), (stride, 1), rows.storage_offset())
    torch.testing.assert_close(from_rows(flat.contiguous(), x, order), x)
    torch.testing.assert_close(from_rows(as_matrix(x, order).contiguous(), x, order), x)


@pytest.mark.parametrize("name", ["heads_from_tokens", "tokens_before_batch"])
def test_dense_results_have_the_memory_order_of_the_input(name):
    x = VIEWS[name]
    y = empty_in_order(x, memory_order(x), torch.float32)
    assert y.shape == x.shape
    assert y.stride() == x.stride()
    per_row = empty_in_order(x, memory_order(x), torch.float32, per_row=True)
    assert per_row.stride() == tuple(stride // 8 for stride in x.stride()[:-1])


def test_dimensions_of_size_one_do_not_disturb_the_order():
    assert memory_order(torch.randn(1, 5, 8).as_strided((1, 5, 8), (1, 8, 1))) is None
    assert memory_order(torch.randn(4, 1, 16)[..., :8]) is None
    assert memory_order(torch.randn(0, 3, 8)) is None
