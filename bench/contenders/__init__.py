"""Who is measured. Each contender stands behind the interface of :mod:`contenders.base`; those that run on
the same servers share a system. May import raftlog, ray and the other clients; knows nothing of works and
pages."""
