"""``raftlog recover`` where most brokers are left: nobody leads but who has the new history's beginning."""

from __future__ import annotations

import pytest
from host_kit import Host

from raftlog.broker.history import HISTORY_TERMS
from raftlog.broker.majority_loss import Fate, Loss
from raftlog.broker.new_history import begin, examine
from raftlog.raft.types import Role
from raftlog.testing.disk import CrashMode

INTERVAL_MS = 200


def blackout(host: Host) -> None:
    """All brokers lose power. What nobody had synced may go, which the watch cannot believe."""
    host.loop.on_step = None
    for broker_id in list(host.cluster.brokers):
        host.cluster.cut_power(broker_id, CrashMode.NONE)


def recover(host: Host) -> Loss:
    disks = host.cluster.disks

    async def work() -> Loss:
        stores, by_broker, loss = await examine({str(broker_id): disk for broker_id, disk in disks.items()})
        await begin(loss, stores, by_broker, 0, lambda _: None)
        return loss

    loss = host.cluster.run(work(), node="recover")
    for broker_id, disk in list(disks.items()):
        disks[broker_id] = disk.kill()
    return loss


@pytest.fixture
def dark() -> Host:
    """Three brokers after a blackout, none of which may lead a topic that is synced now and then."""
    host = Host(1, 3, topic={"flush": "interval", "flush_interval_ms": INTERVAL_MS})
    host.produce(5)
    host.loop.run_for(2 * INTERVAL_MS / 1000)
    blackout(host)
    return host


@pytest.mark.parametrize("which", ["metadata", "partition"])
def test_the_others_elect_nobody_without_the_one_that_has_the_beginning(dark: Host, which: str) -> None:
    """They are a majority by the configuration that they know, and its committed beginning would be cut."""
    host, loss = dark, recover(dark)
    (group,) = loss.groups
    assert group.fate is Fate.CUT
    best = (loss.metadata if which == "metadata" else group).copies[0].broker_id
    others = [broker_id for broker_id in host.cluster.disks if broker_id != best]
    for _ in range(2):  # also after another start
        for broker_id in others:
            host.cluster.start_broker(broker_id)
        for _ in range(100):
            host.loop.run_for(0.1)
            for broker_id in others:
                replicas = host.cluster.brokers[broker_id].replicas()
                known = [
                    each for each in replicas if each.log.spec.topic.startswith("__") == (which == "metadata")
                ]
                assert known or which == "partition"
                assert all(each.node.role is Role.FOLLOWER for each in known)
        for broker_id in others:
            host.cluster.kill_broker(broker_id)
    for broker_id in host.cluster.disks:
        host.cluster.start_broker(broker_id)
    host.wait(lambda: host.leader_id is not None)
    host.produce(3)
    host.wait(host.is_equal)
    assert [int(record.value.split(b":")[0]) for record in host.consume()] == list(range(8))
    host.wait(lambda: len(host.leader.node.conf.voters) == 3)
    assert host.leader.node.term > HISTORY_TERMS
    for broker in host.cluster.brokers.values():
        assert not any(each.node.amnesiac or each.fault for each in broker.replicas())
    host.close()


def test_a_copy_without_the_beginning_counts_for_nothing_certain(dark: Host) -> None:
    """The only one that has it is lost too: what it acknowledged since is lost, and that is said."""
    host, loss = dark, recover(dark)
    (group,) = loss.groups
    best = group.copies[0].broker_id
    del host.cluster.disks[best]
    again = recover(host)
    (group,) = again.groups
    assert group.fate is Fate.CUT
    assert group.term == 2 * HISTORY_TERMS
    assert group.conf.voters == (group.copies[0].replica_id,)
    host.close()
