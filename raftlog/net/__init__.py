"""Streams between processes: frames, handshake, the rpc catalogue, server and connection.

May import ``raftlog.errors``, msgspec and asyncio; knows nothing of Raft, storage or brokers. ``network`` is
the seam to the outside (real here, simulated in ``raftlog.testing``), ``rpc`` and the ``rpc_*`` beside it
hold requests and responses, ``catalogue`` their numbers. Start reading at ``frames`` (how bytes become
messages), then ``handshake`` (who may talk), ``stream`` (what both ends share), ``server`` and ``connection``
(the two ends). ``tunnel`` is the same inside of calls, for who reaches no port.
"""
