"""The Raft consensus core: messages and time in, a list of things to do out, no I/O.

It may import ``raftlog.errors``, ``raftlog.record.frame``, msgspec and the standard library; no asyncio,
sockets, files, clocks or module-level randomness. Start reading at ``types`` (the vocabulary), then
``raw_node`` (the face that a host drives), ``node`` (state, and the map of the layers above it),
``election``, ``leader``, ``follower``. ``log``, ``durability``, ``confstack``, ``progress`` and ``quorum``
are the parts, each complete in itself.
"""
