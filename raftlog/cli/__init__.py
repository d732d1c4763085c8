"""The ``raftlog`` command: what a person at a terminal, or a shell script, does with a cluster.

Nearly every command is a thin reader and writer around the public API: it connects, calls, prints. It may
import that, ``raftlog.record``, and ``raftlog.actors.launch`` for what there is only on Ray. ``verify`` and
``recover`` work on directories, without a cluster, and import storage and broker. None imports Ray.
Modules of commands import what is heavy inside the function that needs it, so that ``raftlog --help`` is
there at once.

Start reading in ``main`` (the commands and how errors end), then ``session`` (the way to the cluster,
replaced in tests), then the command you came for.
"""
