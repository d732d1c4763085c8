"""Replicated state machines: what a group's committed entries add up to.

Each has ``apply(entry)``, ``copy()``, ``snapshot()`` and ``restore()``, and reads nothing but its entries:
no clock (an entry carries the leader's time), no configuration that is not in the log. Applying the same
entries, with or without a snapshot in between, gives an equal state on every replica.

May import record, raft.types, config and errors; no asyncio, no ray. Start reading at ``partition`` (a topic
partition: offsets, producers, open transactions), then ``producers`` (the idempotence rules), ``aborted``
(what readers skip), ``transactions`` (where each transactional id stands), ``groups`` (members and committed
offsets), ``metadata`` (brokers, topics, assignment) and ``command`` (how commands are encoded).
"""
