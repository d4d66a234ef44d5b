"""Groups of processes, started when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.group import Group


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.stop()


@pytest.fixture(scope="session")
def four_processes() -> Iterator[Group]:
    group = Group(4)
    yield group
    group.stop()


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Group:
    """Two processes, or as many as the test's parameter of this name says."""
    return request.getfixturevalue({2: "two_processes", 4: "four_processes"}[getattr(request, "param", 2)])
