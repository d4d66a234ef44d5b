"""Groups of processes, started when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.group import Group


@pytest.fixture(scope="session", autouse=True)
def _compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed compiles an op of its own when it starts. A process that dies at that leaves a lock behind, for which
    all later ones would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


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
