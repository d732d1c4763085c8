"""A broker: hosts replicas of many Raft groups and serves clients. Knows nothing of Ray.

May import raft, storage, state, net, record and controller.placement. Start reading at ``replica.py`` (drives
one Raft node: what the core says becomes durable, is sent, is applied), then ``broker.py`` (hosts many of
them). ``peers.py`` keeps the connections between brokers, ``wire.py`` puts Raft messages into frames,
``fetch.py`` answers consumers, ``metadata.py`` follows and changes the cluster's metadata, ``founding.py``
makes a new cluster's directories.
"""
