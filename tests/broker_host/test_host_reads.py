"""Where a log ends is told only by who still leads it (ReadIndex, thesis section 6.4)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_kit import Host

from raftlog.broker.partition import PartitionReplica
from raftlog.errors import NotLeader
from raftlog.net.rpc import OFFSET_LATEST, ListOffsetsRequest, ListOffsetsResponse, OffsetQuery
from raftlog.testing.sim_cluster import broker_name


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(seed=3, election_timeout_ms=3000)
    yield host
    host.close()


def _ask_end(host: Host, broker_id: int) -> ListOffsetsResponse:
    spec = host.replica(broker_id).log.spec
    request = ListOffsetsRequest([OffsetQuery(spec.topic_id, spec.partition, OFFSET_LATEST)])
    service = host.cluster.brokers[broker_id].server.handler
    return host.cluster.run(service._find_offsets(request), node=broker_name(broker_id))


def test_a_leader_that_was_replaced_unawares_does_not_tell_an_end(host: Host) -> None:
    """It would answer with the end that it knows, and who reads "until the end" would miss what the next
    leader has acknowledged."""
    host.produce(3)
    old = host.leader_id
    assert old is not None
    assert _ask_end(host, old).answers[0].offset == 3
    # Its connections break and do not come back: the others elect a leader at once, which acknowledges more,
    # before this one finds that nobody answers.
    others = [broker_id for broker_id in host.cluster.brokers if broker_id != old]
    for other in others:
        host.cluster.network.cut(broker_name(old), broker_name(other))
        host.cluster.network.break_connections(broker_name(old), broker_name(other))
    host.wait(lambda: any(_serves(host, broker_id) for broker_id in others))
    host.produce(4)
    assert host.replica(old).node.serving
    answer = _ask_end(host, old).answers[0]
    assert answer.error is not None
    assert answer.error.name == NotLeader.__name__
    new = next(broker_id for broker_id in others if _serves(host, broker_id))
    assert _ask_end(host, new).answers[0].offset == 7


def test_a_quiet_group_answers_too(host: Host) -> None:
    host.produce(1)
    host.wait(lambda: host.leader.node.quiet)
    leader = host.leader_id
    assert leader is not None
    assert _ask_end(host, leader).answers[0].offset == 1


def _serves(host: Host, broker_id: int) -> bool:
    replica: PartitionReplica = host.replica(broker_id)
    return replica.staged is not None and replica.node.serving
