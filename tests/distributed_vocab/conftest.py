from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.ranks import Ranks


class Group:
    """A pool of ranks that is started again when a test has ended it."""

    def __init__(self, world: int, folder: Any) -> None:
        self.world, self.folder = world, folder
        self.ranks: Ranks | None = None

    def __call__(self, *arguments: Any, **options: Any) -> list[Any]:
        if self.ranks is None or not self.ranks.processes:
            self.folder.mkdir(exist_ok=True)
            self.folder = self.folder / "again"
            self.folder.mkdir()
            self.ranks = Ranks(self.world, self.folder)
        return self.ranks(*arguments, **options)


@pytest.fixture(scope="session", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    group = Group(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    if group.ranks is not None:
        group.ranks.close()
