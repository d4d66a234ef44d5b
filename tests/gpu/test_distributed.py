"""The main cases of tests/distributed on two GPUs, with NCCL, in fp32 and under bf16 policies.

pytest tests/gpu/test_distributed.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.distributed.group import Group
from tests.distributed.test_exactness import needs_deepspeed
from tests.distributed.training import Run, error, train
from tests.distributed.wrappings import Wrapping

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def gpus() -> Iterator[Group]:
    group = Group(2, device="cuda")
    yield group
    group.stop()


WRAPPINGS = [
    Wrapping("ddp"),
    *(
        Wrapping(kind, head, reshard)
        for kind in ("fsdp1", "fsdp2")
        for head in ("root", "alone")
        for reshard in (True, False)
    ),
    Wrapping("fsdp2", "norm"),
    Wrapping("fsdp1", cpu_offload=True),
    Wrapping("fsdp2", "norm", cpu_offload=True),
    *(pytest.param(Wrapping(f"zero{stage}"), marks=needs_deepspeed) for stage in (1, 2, 3)),
]


@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=str)
@pytest.mark.parametrize("preferences", [False, True], ids=["sft", "dpo"])
def test_fp32_equals_the_stock_model(gpus: Group, wrapping: Wrapping, preferences: bool) -> None:
    run = Run(wrapping, preferences=preferences)
    ours, theirs = (gpus.run(train, replace(run, patched=patched))[0] for patched in (True, False))
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-4, atol=0)
    assert error(ours.gradients, theirs.gradients) < 1e-3
    assert error(ours.parameters, theirs.parameters) < 1e-3


@pytest.mark.parametrize("wrapping", [w for w in WRAPPINGS if isinstance(w, Wrapping) and "fsdp" in w.kind], ids=str)
def test_bf16_is_as_near_to_fp32_as_without_us(gpus: Group, wrapping: Wrapping) -> None:
    run = Run(replace(wrapping, bf16=True))
    exact = gpus.run(train, replace(run, wrapping=wrapping, patched=False))[0]
    ours, theirs = (gpus.run(train, replace(run, patched=patched))[0] for patched in (True, False))
    assert error(ours.gradients, exact.gradients) < 2 * error(theirs.gradients, exact.gradients)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-2, atol=0)


@pytest.mark.parametrize("wrapping", [Wrapping("ddp"), Wrapping("fsdp1"), Wrapping("fsdp2", "norm", False)], ids=str)
def test_a_step_has_the_stock_models_collectives(gpus: Group, wrapping: Wrapping) -> None:
    ours, theirs = (gpus.run(train, Run(wrapping, patched))[0].collectives for patched in (True, False))
    assert ours == theirs and sum(ours.values()) > 0
