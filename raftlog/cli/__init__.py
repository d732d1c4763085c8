"""The ``raftlog`` command: what a person at a terminal, or a shell script, does with a cluster.

Every command is a thin reader and writer around the public API: it connects, calls, prints. It may import the
public API of ``raftlog``, ``raftlog.record`` and ``raftlog.storage.verify``; never brokers, Raft or Ray.
Modules of commands import what is heavy inside the function that needs it, so that ``raftlog --help`` is
there at once.

Start reading in ``main`` (the commands and how errors end), then ``session`` (the way to the cluster,
replaced in tests), then the command you came for.
"""
