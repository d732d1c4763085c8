"""pytest fixtures, found by pytest by themselves once raftlog is installed.

``raftlog_cluster``: a :class:`raftlog.testing.LocalCluster` of one broker, shared by the tests of a module.
``raftlog_log``: its Log.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from raftlog.client.log import Log
    from raftlog.testing.local_cluster import LocalCluster


@pytest.fixture(scope="module")
def raftlog_cluster() -> Iterator[LocalCluster]:
    """A cluster of one broker without Ray."""
    from raftlog.testing.local_cluster import LocalCluster

    with LocalCluster() as cluster:
        yield cluster


@pytest.fixture
def raftlog_log(raftlog_cluster: LocalCluster) -> Log:
    """A Log on ``raftlog_cluster``."""
    return raftlog_cluster.log
