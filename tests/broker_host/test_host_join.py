"""Brokers join, and a wiped disk comes back as a new broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_kit import TOPIC
from test_host_membership import Moving, Writer, check_records

from raftlog.broker.joining import JOINING_PATH, JoiningPlan, join
from raftlog.broker.metadata import METADATA_VOTERS_MAX, MetadataReplica
from raftlog.controller.reconcile import Policy
from raftlog.errors import AuthenticationFailed, Busy, ForeignDataDir, RaftlogError, RequestTimeout
from raftlog.net.connection import RpcConnection
from raftlog.net.handshake import Local
from raftlog.net.rpc import MetadataRequest, MetadataResponse
from raftlog.raft.types import Role
from raftlog.state.metadata_commands import AllocateProducerIds, RemoveBroker
from raftlog.storage.identity import find_identity
from raftlog.storage.manifest import MANIFEST_PATH
from raftlog.testing.disk import SimDisk
from raftlog.testing.moves import Mover
from raftlog.testing.sim_cluster import PORT, broker_name


@pytest.fixture
def host() -> Iterator[Moving]:
    made = Moving(1, 3)
    yield made
    made.close()


def metadata(host: Moving, broker_id: int) -> MetadataReplica:
    return host.cluster.brokers[broker_id].metadata.replica


def metadata_leader(host: Moving) -> MetadataReplica | None:
    for broker in host.cluster.brokers.values():
        if broker.metadata.replica.staged is not None:
            return broker.metadata.replica
    return None


def wait_for_metadata(host: Moving, voters: set[int], learners: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Until the metadata group consists of these brokers, all of them level."""

    def is_so() -> bool:
        leader = metadata_leader(host)
        if leader is None or not leader.node.conf_settled:
            return False
        conf, hosts = leader.node.conf, leader.hosts
        found = ({hosts[each] for each in conf.voters}, {hosts[each] for each in conf.learners})
        running = [metadata(host, broker_id) for broker_id in host.cluster.brokers]
        return found == (voters, learners) and all(
            each.node.applied == leader.node.last_index
            for each in running
            if hosts[each.replica_id] in voters
        )

    host.wait(is_so)


def plan_of(host: Moving, secret: bytes | None = None, brokers: tuple[int, ...] = (0, 1, 2)) -> JoiningPlan:
    plan = host.cluster.plan
    addresses = tuple((broker_name(broker_id), PORT) for broker_id in brokers)
    return JoiningPlan(plan.cluster_id, plan.cluster_name, secret or plan.secret, addresses)


def governed(host: Moving, lost: int) -> Mover:
    """A controller that knows of a broker whose data are gone."""
    mover = Mover(host.cluster, Policy(brokers=3), {lost})
    mover.govern()
    return mover


def is_forgotten(host: Moving, broker_id: int) -> bool:
    return all(broker_id not in each.metadata.image.brokers for each in host.cluster.brokers.values())


# -- joining -------------------------------------------------------------------------------------------------


def test_a_new_broker_learns_votes_and_holds_partitions(host: Moving) -> None:
    host.produce(10)
    added = host.cluster.join_broker()
    assert added == 3
    host.cluster.run(host.cluster.brokers[added].ready(), node=broker_name(added))
    wait_for_metadata(host, {0, 1, 2, 3})
    image = metadata(host, 0).machine
    assert sorted(image.brokers) == [0, 1, 2, 3]
    assert metadata(host, added).replica_id == image.brokers[added].metadata_replica
    host.alter(0, 1, added)
    host.wait(host.has_settled)
    check_records(host, host.count)
    # It is one like the others: killed and started again, and good for a majority.
    host.cluster.kill_broker(added)
    host.cluster.start_broker(added)
    for broker_id in (0, 1):
        host.cluster.kill_broker(broker_id)
    host.loop.run_for(3.0)
    assert metadata_leader(host) is None, "two of four are no majority"
    host.cluster.start_broker(1)
    host.wait(lambda: metadata_leader(host) is not None)
    host.produce(5)
    check_records(host, host.count)


def test_a_new_broker_does_not_say_that_there_is_no_topic(host: Moving) -> None:
    """It listens before it has heard of anything: clients took its empty metadata for the truth."""
    cluster = host.cluster
    added = cluster.join_broker()
    for other in range(3):
        cluster.network.cut(broker_name(other), broker_name(added))

    async def ask() -> MetadataResponse:
        local, seams = (
            Local(cluster.plan.cluster_id, "client", client_id="asks"),
            cluster.seams("asks", "asks"),
        )
        secret = cluster.plan.secret
        connection = await RpcConnection.open(seams, broker_name(added), PORT, local, secret, timeout=1.0)
        try:
            return (await connection.call(MetadataRequest([TOPIC, "gone"]), timeout=1.0))[0]
        finally:
            connection.close()

    assert not cluster.brokers[added].metadata.image.topics
    with pytest.raises(Busy) as caught:
        cluster.run(ask(), node="asks")
    assert caught.value.retriable
    cluster.network.heal()
    host.wait(lambda: added in cluster.brokers[added].metadata.image.brokers)
    answer = cluster.run(ask(), node="asks")
    assert [each.name for each in answer.topics] == [TOPIC]
    assert answer.unknown_topics == ["gone"]


def test_voters_are_five_and_further_brokers_learn(host: Moving) -> None:
    for _ in range(4):
        host.cluster.join_broker()
    voters = set(range(METADATA_VOTERS_MAX))
    wait_for_metadata(host, voters, {5, 6})
    assert metadata(host, 6).node.role is Role.LEARNER
    assert isinstance(host.cluster.run(host.cluster.brokers[6].metadata.call(AllocateProducerIds(1))), int)
    assert host.command(RemoveBroker(host.epoch, 4)) is None
    wait_for_metadata(host, {0, 1, 2, 3, 5}, {6})


def test_the_leader_of_the_metadata_is_removed(host: Moving) -> None:
    host.cluster.join_broker()
    wait_for_metadata(host, {0, 1, 2, 3})
    leader = metadata_leader(host)
    assert leader is not None
    leaves = leader.host.broker_id
    stay = {0, 1, 2, 3} - {leaves}
    host.alter(*stay)
    host.wait(host.has_settled)
    host.command(RemoveBroker(host.epoch, leaves))
    host.wait(lambda: (found := metadata_leader(host)) is not None and found.host.broker_id in stay)
    wait_for_metadata(host, stay)
    host.cluster.kill_broker(leaves)
    host.produce(5)


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("leads", [False, True])
def test_one_of_two_brokers_is_removed(leads: bool, moment: int) -> None:
    """Its vote is needed for its own leaving, also when somebody is started anew meanwhile; then it ends."""
    host = Moving(50 + moment, 2)
    leader = metadata_leader(host)
    assert leader is not None
    stays = 1 - leader.host.broker_id if leads else leader.host.broker_id
    leaves = 1 - stays
    host.alter(stays)
    host.wait(host.has_settled)
    host.command(RemoveBroker(host.epoch, leaves))
    if moment:
        host.loop.run_for(0.005 * moment)
        anew = stays if moment % 2 else leaves
        if not host.cluster.brokers[anew].failed.done():
            host.cluster.kill_broker(anew)
            host.cluster.start_broker(anew)
    host.wait(lambda: metadata_leader(host) is not None and metadata_leader(host).host.broker_id == stays)  # type: ignore[union-attr]
    ended = host.cluster.brokers[leaves].failed
    host.wait(ended.done)
    assert isinstance(ended.result(), ForeignDataDir)
    assert metadata(host, stays).node.conf.members == {metadata(host, stays).replica_id}
    host.cluster.kill_broker(leaves)
    host.produce(5)
    assert host.cluster.join_broker() == 2
    wait_for_metadata(host, {stays, 2})
    host.close()


def test_a_join_that_was_interrupted_is_the_same_broker(host: Moving) -> None:
    """The answer is lost with the process; whoever comes back asks with the same disk id."""
    disk = SimDisk(host.cluster._fork())
    seams = host.cluster.seams("new", "new")
    cluster = host.cluster
    task = host.loop.run_as("new", join(seams, disk, plan_of(host), node_id="n"))
    host.wait(lambda: len(metadata(host, 0).machine.brokers) == 4)
    assert not task.done()
    host.loop.kill("new")
    disk = disk.kill()
    identity = cluster.run(
        join(cluster.seams("again", "again"), disk, plan_of(host), node_id="n"), node="again"
    )
    assert identity.broker_id == 3
    assert len(metadata(host, 0).machine.brokers) == 4
    assert cluster.run(disk.exists(JOINING_PATH)) is False
    again = cluster.run(join(cluster.seams("third", "third"), disk, plan_of(host), node_id="n"), node="third")
    assert again == identity == cluster.run(find_identity(disk)), "nobody is asked any more"


def test_who_may_not_join(host: Moving) -> None:
    cluster = host.cluster

    def attempt(disk: SimDisk, plan: JoiningPlan) -> None:
        cluster.run(join(cluster.seams("new", "new"), disk, plan, node_id="n", timeout=3.0), node="new")

    with pytest.raises(AuthenticationFailed):
        attempt(SimDisk(cluster._fork()), plan_of(host, b"another secret"))
    full = SimDisk(cluster._fork())
    cluster.run(full.replace_file(MANIFEST_PATH, b"data"))
    with pytest.raises(ForeignDataDir, match="has data"):
        attempt(full, plan_of(host))
    with pytest.raises(ForeignDataDir):
        attempt(cluster.disks[0], JoiningPlan("other", "sim", cluster.plan.secret, ()))
    with pytest.raises(RequestTimeout):
        attempt(SimDisk(cluster._fork()), plan_of(host, brokers=()))
    for broker_id in (1, 2):
        cluster.kill_broker(broker_id)
    host.loop.run_for(3.0)
    with pytest.raises(RaftlogError) as caught:
        attempt(SimDisk(cluster._fork()), plan_of(host))
    assert caught.value.retriable, "no majority could agree to it"
    cluster.start_broker(1)
    assert cluster.join_broker() == 3, "nobody who failed was given an id"


def test_a_broker_that_joins_while_the_cluster_is_shaken(host: Moving) -> None:
    """The leader of the metadata group falls at each moment of it."""
    for moment in range(4):
        added = host.cluster.join_broker()
        host.loop.run_for(0.02 * moment)
        leader = metadata_leader(host)
        victim = leader.host.broker_id if leader is not None else 0
        host.cluster.cut_power(victim)
        host.loop.run_for(1.0)
        host.cluster.start_broker(victim)
        host.cluster.run(host.cluster.brokers[added].ready(), node=broker_name(added))
    wait_for_metadata(host, set(range(5)), {5, 6})


# -- a wiped disk --------------------------------------------------------------------------------------------


def test_a_wiped_disk_is_a_new_broker_that_takes_the_place_of_the_old_one(host: Moving) -> None:
    writer = Writer(host)
    host.wait(lambda: writer.sent > 20)
    victim = host.followers()[0]
    host.cluster.cut_power(victim)
    del host.cluster.disks[victim]
    added = host.cluster.join_broker()
    broker = host.cluster.brokers[added]
    host.cluster.run(broker.ready(), node=broker_name(added))
    rows = {row.id: row.state for row in broker.broker_rows()}
    assert rows[victim] == "lost"
    governed(host, victim)
    host.wait(lambda: is_forgotten(host, victim))
    count = writer.stop()
    host.wait(host.has_settled)
    survivors = {0, 1, 2, added} - {victim}
    assert set(host.holders) == survivors
    wait_for_metadata(host, survivors)
    assert victim not in broker.metadata.image.brokers
    check_records(host, count)


def test_who_drains_votes_again_where_otherwise_two_would_be_left(host: Moving) -> None:
    """It gave its vote away while there were four; then one was lost, and two voters bear nothing."""
    added = host.cluster.join_broker()
    wait_for_metadata(host, {0, 1, 2, added})
    host.alter(0, 1, added)
    host.wait(host.has_settled)
    host.cluster.cut_power(2)
    del host.cluster.disks[2]
    mover = Mover(host.cluster, Policy(brokers=3), {2})
    mover.drain([1], True)
    wait_for_metadata(host, {0, 2, added}, {1})
    mover.govern()
    host.wait(lambda: is_forgotten(host, 2))
    wait_for_metadata(host, {0, 1, added})


def test_a_replacement_that_was_interrupted_is_gone_on_with(host: Moving) -> None:
    host.produce(10)
    victim = host.followers()[0]
    host.cluster.cut_power(victim)
    del host.cluster.disks[victim]
    added = host.cluster.join_broker()
    mover = governed(host, victim)
    host.wait(lambda: bool(host.assignment.leaving))
    mover.kill_controllers()
    host.loop.run_for(1.0)
    assert not is_forgotten(host, victim)
    mover.govern()
    host.wait(lambda: is_forgotten(host, victim))
    host.wait(host.has_settled)
    assert set(host.holders) == {0, 1, 2, added} - {victim}


def test_the_old_data_come_back_and_are_not_let_in(host: Moving) -> None:
    """The disk was not wiped but away: its broker was removed meanwhile, and stays so."""
    host.produce(10)
    victim = host.followers()[0]
    host.cluster.kill_broker(victim)
    host.cluster.join_broker()
    governed(host, victim)
    host.wait(lambda: is_forgotten(host, victim))
    host.wait(host.has_settled)
    host.cluster.start_broker(victim)
    old = host.cluster.brokers[victim]
    host.wait(old.failed.done)
    assert isinstance(old.failed.result(), ForeignDataDir)
    assert "removed" in str(old.failed.result())
    host.cluster.kill_broker(victim)
    host.produce(5)
    check_records(host, host.count)
