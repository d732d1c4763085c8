"""A cluster without Ray for each module; what is marked ``ray`` runs Ray Data on a local Ray against it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import ray_of_all

import raftlog
from raftlog.testing import LocalCluster

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray.data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # Ray warns about itself (unclosed files, deprecations); our own warnings are errors elsewhere.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(brokers=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def log(cluster: LocalCluster) -> raftlog.Log:
    return cluster.log


@pytest.fixture(scope="session")
def ray_data() -> Iterator[None]:
    """A Ray cluster of this session's own."""
    with ray_of_all():
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
