from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.group import Group


@pytest.fixture(scope="session", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Group]:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    group = Group(request.param, "cuda" if torch.cuda.device_count() >= request.param else "cpu")
    yield group
    group.stop()
