"""No op makes the host wait for the GPU, and a patched model's step waits nowhere that the stock one doesn't."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import sequences, tiny_llama

import liger_trainer

from ..kernels.cases import CASES, Sizes, ids, run, strided

SIZES = Sizes(tokens=37, width=64, classes=1031, tile_rows=16)
PACKAGE = Path(liger_trainer.__file__).parent
TORCH = Path(torch.__file__).parent


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def recorded_syncs() -> Iterator[list[str]]:
    """Collect the file of the code, other than PyTorch's, that made the host wait, once for every time that it did."""
    found: list[str] = []

    def record(message, category, *_):
        if "synchronizing CUDA operation" in str(message):
            files = [frame.filename for frame in traceback.extract_stack()]
            # The innermost frames are this function and the warnings module.
            callers = [
                f for f in files if f != __file__ and Path(f).name != "warnings.py" and TORCH not in Path(f).parents
            ]
            found.append(callers[-1] if callers else "")

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        with sync_debug_mode("warn"):
            yield found


def test_a_sync_is_seen():
    x = torch.ones(3, device="cuda")
    with recorded_syncs() as syncs:
        x.sum().item()
        x[x > 0].sum()
    assert len(syncs) >= 2
    with sync_debug_mode("error"), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        x.sum().item()


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.asks_device], ids=ids)
def test_no_op_waits(case, dtype, layout):
    call = case.make("cuda", dtype, SIZES, layout)
    upstream = call.upstream(call())
    for retain_graph in (True, False):
        run(call, upstream, retain_graph=retain_graph)  # compiles kernels, makes handles
        torch.cuda.synchronize()
        with sync_debug_mode("error"):
            run(call, upstream, retain_graph=retain_graph)


@pytest.mark.parametrize("case", [case for case in CASES if case.asks_device], ids=ids)
def test_without_a_bound_the_host_waits_once_for_the_count_of_labels(case):
    call = case.make("cuda", torch.bfloat16, SIZES)
    upstream = call.upstream(call())
    run(call, upstream)
    with recorded_syncs() as syncs:
        run(call, upstream)
    assert len(syncs) == 1


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
def test_a_patched_step_waits_nowhere_that_the_stock_one_does_not(padded, autocast):
    stock = tiny_llama().train().to("cuda", torch.float32 if autocast else torch.bfloat16)
    patched = copy.deepcopy(stock)
    report = liger_trainer.apply_liger_kernel(patched)
    assert {"rms_norm", "mlp", "rope", "fused_linear_cross_entropy"} <= {each.kind for each in report.replaced}
    batches = []
    for seed in (1, 2, 3):
        rows = sequences(8, seed=seed)
        batch = {name: torch.stack([row[name] for row in rows]).cuda() for name in rows[0]}
        batch["labels"][seed:, -seed:] = -100  # another number of labels in each
        if not padded:
            del batch["attention_mask"]
        batches.append(batch)

    def syncs_of(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(batch):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step(batches[0])
        with recorded_syncs() as syncs:
            for batch in batches[1:]:
                step(batch)
        return syncs

    ours, theirs = syncs_of(patched), syncs_of(stock)
    assert not [file for file in ours if PACKAGE in Path(file).parents]
    assert len(ours) <= len(theirs), (ours, theirs)
