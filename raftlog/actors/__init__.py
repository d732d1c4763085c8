"""raftlog on Ray: thin hosts of what the rest of the package does, and nothing else.

The only place (with ``raftlog.data``) that imports ray. ``launch.py`` is where ``raftlog.start``, ``connect``
and ``shutdown`` end up; ``metadata.py`` is the named actor that founds or recovers the cluster and keeps its
brokers running, by ``hands.py``; ``broker.py`` hosts one broker; ``promises.py`` backs ``delivery.ref``;
``processors.py`` are the workers of ``log.process``; ``options.py`` says where actors are placed and with
which resources; ``metrics.py`` and ``logs.py`` take what is to be seen to where Ray keeps it.

Ray does naming, placement, supervision and the futures users hold. Records never pass through it, except for
clients that ask for it (``tunnels.py``).
"""
