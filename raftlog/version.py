"""The version of raftlog, which every side of a connection tells the other."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Final

NOT_INSTALLED: Final = "0+source"
"""Where raftlog is imported from a checkout that was not installed."""


@cache
def software_version() -> str:
    """Version of the installed distribution, e.g. "0.1.0"."""
    try:
        return importlib.metadata.version("raftlog")
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
