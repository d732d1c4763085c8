"""Two processes run as one broker: the newer one shuts out the older, whatever that was doing."""

from __future__ import annotations

import pytest
from host_kit import Host
from test_host_membership import Writer, check_records

from raftlog.broker.broker import Broker, BrokerPlace
from raftlog.errors import StaleIncarnation
from raftlog.testing.sim_cluster import PORT, broker_name

SECOND = "second"


def start_second(host: Host, broker_id: int) -> Broker:
    """Another process of that broker, on another machine, on the data as they are now."""
    cluster = host.cluster
    start = Broker.start(
        cluster.seams(SECOND, SECOND),
        cluster.disks[broker_id].copy(),
        config=cluster.config,
        place=BrokerPlace(host=SECOND, port=PORT, node_id=SECOND),
        storage=cluster.storage,
    )
    return cluster.run(start, node=SECOND)


@pytest.mark.parametrize("seed", range(4))
def test_a_leader_with_writes_in_flight_gives_way_to_its_successor(seed: int) -> None:
    host = Host(30 + seed)
    writer = Writer(host)
    host.wait(lambda: writer.sent > 30)
    broker_id = host.leader_id
    assert broker_id is not None
    older = host.leader
    for other in host.followers():
        host.cluster.network.cut(broker_name(broker_id), broker_name(other), both=True)
    host.wait(lambda: older.node.last_index > older.node.commit)
    host.loop.on_step = None  # the watch keeps one set of books per broker
    second = start_second(host, broker_id)
    assert second.identity.incarnation == host.cluster.brokers[broker_id].identity.incarnation + 1
    sent = writer.sent
    host.wait(lambda: writer.sent > sent + 20)  # the others and the successor go on
    host.cluster.network.heal()
    ended = host.cluster.brokers[broker_id].failed
    host.wait(ended.done)
    assert isinstance(ended.result(), StaleIncarnation)
    assert older.staged is None
    count = writer.stop()
    del host.cluster.brokers[broker_id]
    newer = next(replica for replica in second.replicas() if replica.replica_id == older.replica_id)
    host.wait(lambda: newer.node.applied == newer.node.last_index and newer.node.commit >= older.node.commit)
    check_records(host, count)
    host.close()


def test_the_older_one_loses_even_where_nobody_was_cut_off() -> None:
    host = Host(40)
    writer = Writer(host)
    host.wait(lambda: writer.sent > 30)
    broker_id = host.leader_id
    assert broker_id is not None
    older = host.leader
    host.loop.on_step = None
    start_second(host, broker_id)
    ended = host.cluster.brokers[broker_id].failed
    host.wait(ended.done)
    assert older.fault is not None
    sent = writer.sent
    host.wait(lambda: writer.sent > sent + 20)
    count = writer.stop()
    del host.cluster.brokers[broker_id]
    check_records(host, count)
    host.close()
