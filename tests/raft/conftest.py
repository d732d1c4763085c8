"""The group under test."""

from __future__ import annotations

import pytest
from raft_cluster import Cluster


@pytest.fixture
def cluster() -> Cluster:
    """Three voters, nobody leads yet."""
    return Cluster(3)
