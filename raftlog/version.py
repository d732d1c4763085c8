"""The version of the installed raftlog, which every side of a connection tells the other."""

from __future__ import annotations

import importlib.metadata
from functools import cache


@cache
def software_version() -> str:
    """Version of the installed distribution, e.g. "0.1.0"."""
    return importlib.metadata.version("raftlog")
