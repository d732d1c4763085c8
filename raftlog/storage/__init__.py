"""Durable storage of one broker: a shared journal, segments per replica, recovery, verification.

The journal takes every write of every replica, so that one fdatasync serves a whole group commit; segments
are filled lazily from memory with what is committed. docs/FORMAT.md, section "On disk", gives every byte.

May import ``raftlog.errors``, ``raftlog.record``, ``raftlog.raft.types`` and nothing else of raftlog.

Where to start reading: :mod:`raftlog.storage.disk` (the seam below), :mod:`raftlog.storage.store` (what the
broker sees), :mod:`raftlog.storage.journal` (group commit), :mod:`raftlog.storage.journal_scan` (what
recovery believes), :mod:`raftlog.storage.replica_log` (one replica's log), :mod:`raftlog.storage.damage`
(what can be made right again, and how: ``salvage``, ``repair``, ``ward``),
:mod:`raftlog.storage.offline` (a directory without its broker).
"""
