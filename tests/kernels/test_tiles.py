"""The engine's choice of rows, over whatever sizes there may be."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_trainer.kernels._tiles import partition_rows, plan, tiles
from liger_trainer.kernels._triton import INTERPRETED


@given(st.integers(0, 5000), st.integers(1, 200_000), st.sampled_from([2, 4, 8]), st.integers(1, 2**29))
def test_tiles_cover_every_row_once_and_fit(n_rows, n_classes, itemsize, tile_bytes):
    ranges = list(tiles(n_rows, n_classes, itemsize, tile_bytes))
    assert [row for start, end in ranges for row in range(start, end)] == list(range(n_rows))
    for start, end in ranges:
        assert end - start == 1 or (end - start) * n_classes * itemsize <= tile_bytes
    lengths = [end - start for start, end in ranges[:-1]]  # the last takes what is left
    most = tile_bytes // (n_classes * itemsize)
    unit = 256 if most >= 1024 else 64 if most >= 64 else 1
    assert all(length % unit == 0 for length in lengths)
    assert not lengths or max(lengths) == lengths[0] <= min(lengths) + unit
    assert len(ranges) <= 1 + n_rows // max(1, most - most % unit)


@given(st.integers(0, 20_000), st.integers(1, 4096), st.integers(1, 200_000), st.none() | st.integers(1, 2**31))
def test_all_rows_at_once_take_no_more_memory_than_tiles(n_rows, width, n_classes, tile_bytes):
    weight = torch.empty(n_classes, width, dtype=torch.bfloat16, device="meta")
    logits, gradient, accumulated = 2 * n_rows * n_classes, weight.nbytes, 2 * weight.nbytes
    tile, at_once = plan(n_rows, weight.shape, torch.bfloat16, torch.bfloat16, tile_bytes)
    assert tile_bytes in (None, tile)
    # Tiles need the wider buffer together with a tile first, with the rounded gradient then.
    assert at_once == (logits + gradient <= accumulated + max(tile, gradient))
    for dtype in (None, torch.float32):  # frozen, or not rounded
        assert not plan(n_rows, weight.shape, torch.bfloat16, dtype, tile_bytes)[1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([-100, 0, 7]), max_size=1100), st.integers(0, 3))
def test_rows_with_a_label_come_first_and_each_row_once(labels, slack):
    labels = torch.tensor(labels, dtype=torch.long)
    n, n_labelled = len(labels), int((labels != -100).sum())
    for use_kernel in (False, True) if INTERPRETED else (False,):
        for bound in (None, n_labelled + slack):
            rows, n_rows = partition_rows(labels, -100, bound, use_kernel)
            if rows is None:
                assert n_rows == n
                continue
            assert n_labelled <= n_rows <= n_labelled + slack
            assert sorted(rows.tolist()) == list(range(n))
            assert (labels[rows[:n_labelled]] != -100).all()
            assert (labels[rows[n_labelled:]] == -100).all()
