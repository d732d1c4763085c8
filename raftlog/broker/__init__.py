"""A broker: hosts replicas of many Raft groups and serves clients. Knows nothing of Ray.

May import raft, storage, state, net, record and controller.placement. Start reading at ``replica.py`` (drives
one Raft node: what the core says becomes durable, is sent, is applied), then ``broker.py`` (hosts many of
them). ``peers.py`` keeps the connections between brokers, ``wire.py`` puts Raft messages into frames,
``service.py``, ``coordination.py``, ``produce.py`` and ``fetch.py`` answer requests, ``partition.py`` is a
topic partition's replica and ``isolation.py`` what readers of committed records get of it, ``cycle.py`` pumps
all replicas together, ``host.py`` is what a replica sees of its broker, ``recovery.py`` brings its state
machine back after a restart, ``metadata.py`` follows and changes the cluster's metadata, ``hosting.py`` has
those replicas here that it names, ``membership.py`` leads a group's configuration to what it wants;
``founding.py`` makes a new cluster's directories and ``joining.py`` those of a broker that comes later.
``repair.py`` mends damaged replicas from peers, ``majority_loss.py`` and ``new_history.py`` have a cluster go
on that has lost its majority for good. ``pulse.py`` lets time pass and lets idle groups rest,
``retention.py`` has old data removed, ``snapshots.py`` brings followers up that are too far behind,
``out_of_service.py`` shows replicas that must not run, ``governing.py`` answers the controller,
``sampling.py`` and ``events.py`` say what goes on.

Groups and transactions: what is decided is pure, in ``groups.py`` with ``group_offsets.py`` and
``assignors.py``, and in ``transactions.py``; ``group_replica.py`` and ``transaction_replica.py`` host it,
``markers.py`` takes the end of a transaction to its partitions, ``internal_topics.py`` makes the topics.
"""
