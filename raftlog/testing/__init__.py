"""For tests: of programs that use raftlog, and of raftlog itself.

``LocalCluster`` is a real cluster in this process without Ray; the pytest fixtures ``raftlog_cluster`` and
``raftlog_log`` give one to a test. The simulator runs whole clusters in virtual time: ``loop`` (no clock, no
selector), ``network`` and ``disk`` stand behind the seams, ``sim_cluster`` starts production brokers on them,
``simulate`` is the command; docs/TESTING.md says what is in the other modules. May import everything; nothing
imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftlog.testing.local_cluster import LocalCluster

__all__ = ["LocalCluster"]


def __getattr__(name: str) -> Any:
    if name == "LocalCluster":
        from raftlog.testing.local_cluster import LocalCluster

        return LocalCluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
