"""The client: producers, consumers and administration, and how they find the cluster.

The core is asynchronous and runs on one event loop. Its only way out is the seams it is given (network, wall
clock, Random), so that tests run it in virtual time. Two thin faces stand on it: the blocking one (``log``,
``sync``), whose handles share one I/O thread per process, and ``raftlog.aio``, on the user's own loop.

May import record, net, serde, config and errors; never raft, storage, state or broker. Ray is reached only
through ``raftlog.actors``, and only when a handle needs it.

Start reading at ``cluster`` (connections, and who leads what), then ``delivery``, ``accumulator``, ``sender``
and ``outbox`` (a record's way out: what a producer remembers, batches and their window, one request for each
broker), ``transaction`` and ``process`` (all of it or nothing; consume, transform, produce), ``fetcher`` and
``consumer`` (the way in). ``transports`` says how the bytes get there.
"""
