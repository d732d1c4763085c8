"""Where the log lines of raftlog's own actors go: to files of their own among Ray's."""

from __future__ import annotations

from pathlib import Path

import ray

from raftlog.config import BrokerConfig
from raftlog.telemetry.logs import configure


def log_as(name: str, config: BrokerConfig) -> None:
    """From now on this process logs to ``raftlog-<name>.log`` in the folder of Ray's log files on its node,
    and warnings to stderr as well, as before: Ray shows these to the driver.

    Args:
        name: of the actor.
        config: says in which format, and what.
    """
    folder = _folder()
    file = None if folder is None else folder / f"raftlog-{name.replace(':', '-')}.log"
    configure(config.log_format, config.log_level, file)


def _folder() -> Path | None:
    """Of Ray's log files. Ray has no public way to ask; without an answer all goes to stderr, and from there
    into a file of Ray's."""
    node = getattr(ray._private.worker, "_global_node", None)
    ask = getattr(node, "get_logs_dir_path", None)
    if ask is None:
        return None
    folder = Path(ask())
    return folder if folder.is_dir() else None
