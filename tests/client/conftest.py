"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_cluster import SimWorld


@pytest.fixture
def world() -> Iterator[SimWorld]:
    """Three fake brokers in virtual time."""
    made = SimWorld()
    yield made
    made.close()
