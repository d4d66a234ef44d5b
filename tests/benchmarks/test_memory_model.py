"""The calculation of memory on many GPUs: against measured runs, and against counts that are made another way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from training import memory_model
from training.memory_model import BOUND, PAGE, Setting, error, measured, page, peak_bytes
from training.sharded_shapes import SHAPES


def test_measured_runs_on_one_gpu_are_within_the_stated_bound():
    runs = [(setting, found) for _, setting, found in measured() if setting.gpus == 1]
    assert {setting.provider for setting, _ in runs} == set(memory_model.PROVIDERS)
    for setting, found in runs:
        assert abs(error(setting, found)) < BOUND, (setting, found)


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(SHAPES[name].config())
    assert SHAPES[name].parameters == sum(each.numel() for each in model.parameters())
    layer = model.model.layers[0]
    assert SHAPES[name].layer_parameters == sum(each.numel() for each in layer.parameters())


BIG = Setting(SHAPES["llama-3-8b"], "hf", "zero3", 8, 8, 4096, True)


def test_what_is_divided():
    by_stage = [peak_bytes(replace(BIG, strategy=each)) for each in ("ddp", "zero1", "zero2", "zero3")]
    assert by_stage[0] > by_stage[1] >= by_stage[2] > by_stage[3]
    assert peak_bytes(replace(BIG, strategy="fsdp1")) == peak_bytes(replace(BIG, strategy="fsdp2")) == by_stage[3]
    # 16 GPUs instead of 8 save a sixteenth of weights, moments and nothing else.
    saved = by_stage[3] - peak_bytes(replace(BIG, gpus=16))
    assert saved == pytest.approx((2 + 4) * BIG.shape.parameters / 16, rel=1e-6)


def test_the_logits_are_what_differs_at_the_loss():
    # Norms aside, hf's peak over ours is three fp32 matrices of logits, less our buffer, tile and gradient.
    logits = 12 * BIG.tokens * BIG.shape.vocab_size
    weight = BIG.shape.head_parameters
    ours = 4 * weight + 2 * weight + 2 * BIG.tokens * BIG.shape.hidden_size
    norms = 4 * BIG.tokens * BIG.shape.hidden_size
    assert memory_model.loss_bytes(BIG) - memory_model.loss_bytes(replace(BIG, provider="ours")) == logits - ours
    assert peak_bytes(BIG) - peak_bytes(replace(BIG, provider="ours")) <= logits - ours + norms


def test_the_longest_sequence_is_the_longest_that_fits():
    setting, capacity = replace(BIG, batch=1, length=0), 80 * 10**9
    length = memory_model.largest_length(setting, capacity)
    assert peak_bytes(replace(setting, length=length)) <= capacity < peak_bytes(replace(setting, length=length + 1024))
    assert memory_model.largest_length(setting, 10**9) == 0


def test_runs_on_many_gpus_are_read_as_well(tmp_path):
    shape = {"model": "llama-3.2-1b", "task": "sft", "strategy": "fsdp2", "gpus": 2, "batch": 4, "length": 4096}
    shape |= {"checkpointing": False, "trainer": False}
    rows = [
        {"provider": "ours", "dtype": "bfloat16", "shape": shape, "peak_bytes": 25e9},
        {"provider": "ours", "dtype": "bfloat16", "shape": shape | {"task": "dpo"}, "peak_bytes": 25e9},
        {"provider": "hf", "dtype": "bfloat16", "shape": shape, "peak_bytes": None, "error": "out of memory"},
    ]
    (tmp_path / "distributed_sft_h200.json").write_text(json.dumps({"benchmark": "distributed_sft", "rows": rows}))
    ((file, setting, found),) = measured(tmp_path)
    assert (file, setting.strategy, setting.gpus, found) == ("distributed_sft_h200.json", "fsdp2", 2, 25e9)
    assert "fsdp2 on 2" in page(tmp_path)
