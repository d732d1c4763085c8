"""raftlog on Ray: thin hosts of what the rest of the package does, and nothing else.

The only place (with ``raftlog.data``) that imports ray. ``launch.py`` is where ``raftlog.start``, ``connect``
and ``shutdown`` end up; ``metadata.py`` is the named actor that founds or recovers the cluster and keeps its
brokers running; ``broker.py`` hosts one broker; ``promises.py`` backs ``delivery.ref``; ``options.py`` says
where actors are placed and with which resources.

Ray does naming, placement, supervision and the futures users hold. Records never pass through it.
"""
