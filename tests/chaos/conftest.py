"""Many real processes on one database, and a ledger of what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import Nursery


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="workers that the test of random kills ends (default: 20)")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How many workers to kill; 20 too where pytest began above this folder, and does not know the option."""
    found: int = request.config.getoption("--kills", 20)
    return found


@pytest.fixture(scope="session")
def warm_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("processes"))
    yield nursery
    nursery.close()


@pytest.fixture
def nursery(warm_nursery: Nursery, tmp_path: Path) -> Iterator[Nursery]:
    """Forks real processes that start at once; they are gone after the test."""
    warm_nursery.folder = tmp_path
    yield warm_nursery
    warm_nursery.clear()
