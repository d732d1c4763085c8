"""A group in miniature: what a leader stages, and the entries that come of it."""

from __future__ import annotations

import pytest
from partition_group import Group


@pytest.fixture
def group() -> Group:
    return Group()
