"""One local Ray per session, and one raftlog cluster of three brokers per module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import ray_of_all

import raftlog


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            # Ray warns about itself (unclosed files, deprecations); our own warnings are errors elsewhere.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray cluster of this session's own."""
    with ray_of_all():
        yield


@pytest.fixture
def sessions() -> Iterator[str]:
    """Where a Ray of several nodes keeps its own: a short path, for there are sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as path:
        yield path


@pytest.fixture(scope="module")
def cluster_name(request: pytest.FixtureRequest) -> str:
    return request.module.__name__.rsplit(".", 1)[-1].replace("_", "-")


@pytest.fixture(scope="module")
def log(
    ray_session: None, cluster_name: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[raftlog.Log]:
    """A cluster of three brokers, shared by the module's tests."""
    data_dir = tmp_path_factory.mktemp("data")
    log = raftlog.start(cluster_name, brokers=3, data_dir=str(data_dir))
    yield log
    log.close()
    raftlog.shutdown(cluster_name, force=True)
