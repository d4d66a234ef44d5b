"""A head that the ranks of a group hold together, against float64 on one process: losses, statistics, gradients."""

from __future__ import annotations

import pytest
import torch

from liger_trainer.kernels import VocabularyShard, linear_cross_entropy
from liger_trainer.kernels._triton import INTERPRETED

from . import on_rank


@pytest.fixture(autouse=True)
def _needs_kernels(request):
    """Kernels run on a GPU for each rank, or on the CPU by Triton's interpreter."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("triton") and not INTERPRETED and torch.cuda.device_count() < params["ranks"]:
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU for each rank")


OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "no bias": {"bias": False},
    "token_weights": {"token_weights": "random"},
    "class_weights": {"class_weights": "random", "label_smoothing": 0.1},
    "token_scaling": {"token_scaling": True, "token_weights": "random"},
}


@pytest.mark.parametrize(
    ("reduction", "triton"),
    [("mean", False), ("sum", False), ("none", False), ("mean", True)],
    ids=lambda value: f"{value}",
)
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(ranks, name, reduction, triton):
    for dtype in (torch.float32,) if triton else (torch.float64, torch.float32):
        ranks.run(on_rank.cross_entropy, dtype, reduction, triton=triton, **OPTIONS[name])


@pytest.mark.parametrize(
    ("outputs", "triton"),
    [((), False), (("entropy",), False), (on_rank.OUTPUTS, False), (on_rank.OUTPUTS, True)],
    ids=["alone", "entropy", "all", "all-triton"],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"frozen_head": True}, {"cache_bytes": 0}, {"least_memory": True}, {"softcap": 3.0, "logit_scale": 0.7}],
    ids=["kept", "frozen", "recomputed", "least memory", "softcap"],
)
def test_log_probs(ranks, options, outputs, triton):
    for dtype in (torch.float32,) if triton else (torch.float64, torch.float32):
        ranks.run(on_rank.log_probs, dtype, outputs, triton=triton, **options)


@pytest.mark.parametrize("divided", [False, True], ids=["rows", "DTensor"])
def test_a_low_rank_term(ranks, divided):
    for dtype in (torch.float64, torch.float32):
        for options in ({}, {"reduction": "none", "cache_bytes": 0}, {"least_memory": True}):
            ranks.run(on_rank.low_rank, dtype, divided=divided, **options)


@pytest.mark.parametrize("labels", ["first", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shards_without_labels(ranks, labels, dtype):
    for reduction in ("mean", "none"):
        ranks.run(on_rank.cross_entropy, dtype, reduction, labels=labels)
    ranks.run(on_rank.log_probs, dtype, on_rank.OUTPUTS, labels=labels)


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_shards_of_any_size(ranks, triton):
    options = {"dtype": torch.float32, "triton": triton}
    one, none = ([1], [0]) if ranks.size == 2 else ([100, 101], [0, 60])
    for cuts in (one, none):  # a single class, and no class at all
        ranks.run(on_rank.cross_entropy, cuts=cuts, label_smoothing=0.1, **options)
        ranks.run(on_rank.log_probs, outputs=on_rank.OUTPUTS, cuts=cuts, **options)
        ranks.run(on_rank.log_probs, outputs=on_rank.OUTPUTS, cuts=cuts, least_memory=True, **options)
    ranks.run(on_rank.cross_entropy, v=ranks.size + 1, **options)  # 3 ranks: 2, 2 and 0 classes


def test_half_precision(ranks):
    for dtype in (torch.bfloat16, torch.float16):
        ranks.run(on_rank.cross_entropy, dtype, token_weights="random")
        ranks.run(on_rank.log_probs, dtype, ("entropy",))


def test_num_items_and_a_bound_of_the_labels(ranks):
    ranks.run(on_rank.cross_entropy, torch.float64, num_items=7.0, max_valid=20)


def test_no_rank_has_all_classes_and_collectives_are_few(ranks):
    valid, tiles = 14, 5
    for found in ranks.run(on_rank.cross_entropy, torch.float32, tile_rows=3):
        assert found["columns"] <= found["largest"] < on_rank.V
        assert found["elements"] <= found["largest"] * on_rank.H  # this rank's weight and its gradient
        assert found["all_gather_into_tensor"] == tiles == -(-valid // 3)
        assert found["all_reduce"] == 1
    for found in ranks.run(on_rank.cross_entropy, torch.float32, "none", tile_rows=3):
        assert (found["all_gather_into_tensor"], found["all_reduce"]) == (tiles, 1)
    for found in ranks.run(on_rank.log_probs, torch.float32, ("entropy",), cache_bytes=0):
        assert found["columns"] <= found["largest"]
        assert (found["all_gather_into_tensor"], found["all_reduce"]) == (tiles, 1)


@pytest.mark.parametrize("hidden", ["plain", "replicated", "sharded"])
def test_dtensors(ranks, hidden):
    ranks.run(on_rank.from_dtensors, hidden)


def test_labels_that_differ_between_ranks_do_not_pass_unseen(ranks):
    assert ranks.run(on_rank.labels_that_differ) == [(True, True)] * ranks.size


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_masked_classes(ranks, triton):
    ranks.run(on_rank.masked_classes, torch.float32, triton)


class OneRank:
    group_name = "one"

    def size(self):
        return 1

    def rank(self):
        return 0


def test_wrong_shards_are_refused():
    hidden, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for shard in (VocabularyShard(OneRank(), 9, 4, 6), VocabularyShard(OneRank(), 9, 0, 5)):
        with pytest.raises(ValueError, match="weight must have rows of classes .* got \\(6, 4\\)"):
            linear_cross_entropy(hidden, torch.randn(6, 4), labels, vocab_shard=shard)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\)"):
        linear_cross_entropy(hidden, torch.randn(6, 4), labels + 8, vocab_shard=VocabularyShard(OneRank(), 9, 0, 6))


def test_the_first_classes_of_a_shard():
    shard = VocabularyShard(None, 100, 50, 50)
    assert shard.first(70) == VocabularyShard(None, 70, 50, 50)
    assert shard.first(30) == VocabularyShard(None, 30, 30, 30)
