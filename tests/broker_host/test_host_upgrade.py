"""A cluster is upgraded broker by broker under a producer: what the new release brings is refused until the
level is raised, and an old broker that meets it halts only what it cannot read.

Release 2 is release 1 with one more metadata command, one more field at the end of a heartbeat, and another
rpc version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from host_kit import Host
from test_host_membership import Writer, check_records

from raftlog.broker.broker import Broker
from raftlog.broker.metadata import MetadataReplica
from raftlog.broker.out_of_service import out_of_service_rows
from raftlog.client.admin import Admin
from raftlog.errors import ConfigError, IncompatibleVersion, NeedsUpgrade, RaftlogError
from raftlog.net.rpc import BrokerHeartbeat, Struct, UpgradeResponse
from raftlog.record.frame import Buffer, FrameKind
from raftlog.state import partition as partition_module
from raftlog.state.command import CommandCodec, CommandStruct
from raftlog.state.metadata import FEATURE_LEVEL_MAX, MetadataState
from raftlog.state.metadata_commands import COMMANDS, AllocateProducerIds, CreateTopic
from raftlog.state.partition import ExpireProducers, SetLogStart
from raftlog.testing import books
from raftlog.testing.loop import current_node
from raftlog.testing.sim_cluster import broker_name

NEW_LEVEL = FEATURE_LEVEL_MAX + 1


class Salute(CommandStruct, frozen=True):
    """What release 2 brings. Result: how many times it was done."""

    type = 999
    needs_level = NEW_LEVEL
    result = int
    word: str


class State2(MetadataState):
    """The metadata of release 2."""

    codec = CommandCodec("metadata", *COMMANDS, Salute)  # type: ignore[type-var]
    level_max = NEW_LEVEL

    def __init__(self) -> None:
        super().__init__()
        self.salutes: list[str] = []

    def copy(self) -> State2:
        copied = super().copy()
        assert isinstance(copied, State2)
        copied.salutes = list(self.salutes)
        return copied

    def _salute(self, command: Salute) -> int:
        self.salutes.append(command.word)
        return len(self.salutes)

    _handlers = {**MetadataState._handlers, Salute: (None, _salute)}  # noqa: RUF012 - as in the base class


class BrokerHeartbeat2(BrokerHeartbeat, frozen=True):
    load: int = 0


class Rolling(Host):
    """A cluster whose brokers run either release, as they were started last."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed, 3)
        self.one = self.cluster._broker_class

        class Two(self.one):  # type: ignore[name-defined, misc]
            metadata_machine = State2
            rpc_versions = (1, 2)

            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                broadcast = self.peers.broadcast

                def loaded(message: Any) -> None:
                    if isinstance(message, BrokerHeartbeat):
                        message = BrokerHeartbeat2(message.retired, load=7)
                    broadcast(message)

                self.peers.broadcast = loaded

        self.two: type[Broker] = Two

    def restart(self, broker_id: int, release: type[Broker]) -> None:
        """Kill the broker if it runs, and start it with that release."""
        if broker_id in self.cluster.brokers:
            self.cluster.kill_broker(broker_id)
        self.cluster._broker_class = release
        self.cluster.start_broker(broker_id)
        self.cluster.run(self.cluster.brokers[broker_id].ready(), node=broker_name(broker_id))

    def roll(self, release: type[Broker]) -> None:
        for broker_id in range(3):
            self.restart(broker_id, release)

    def let_halt(self) -> None:
        """From here on a replica may halt: elsewhere the watch takes that for a bug."""
        self.loop.on_step = None

    def metadata(self, broker_id: int) -> MetadataReplica:
        return self.cluster.brokers[broker_id].metadata.replica

    def salute(self, broker_id: int) -> object:
        """Have the new command applied, asking this broker, which runs release 2."""
        self.wait(lambda: self.metadata(broker_id).leader_broker is not None)
        self.wait(lambda: any(self.metadata(each).staged is not None for each in self.cluster.brokers))
        call = self.cluster.brokers[broker_id].metadata.call
        return self.cluster.run(call(Salute("hello")), node=broker_name(broker_id))  # type: ignore[arg-type]

    def upgrade(self, level: int = 0) -> UpgradeResponse:
        """What `raftlog upgrade` does."""

        async def ask() -> UpgradeResponse:
            client = self.client("operator")
            try:
                return await Admin(client).upgrade(level, 30.0)
            finally:
                await client.close()

        return self.cluster.run(ask(), node="operator")

    def versions(self, broker_id: int) -> dict[int, int]:
        """Broker id -> the rpc version of the connection to it."""
        broker = self.cluster.brokers[broker_id]
        return {
            other: broker.peers.connection(other).rpc_version
            for other in self.cluster.brokers
            if other != broker_id and broker.peers.is_up(other)
        }


@pytest.fixture
def host() -> Iterator[Rolling]:
    made = Rolling()
    yield made
    made.close()


def test_a_cluster_is_rolled_broker_by_broker_under_a_producer(host: Rolling) -> None:
    writer = Writer(host)
    host.wait(lambda: writer.sent > 20)
    for broker_id in range(3):
        host.restart(broker_id, host.two)
        with pytest.raises(NeedsUpgrade) as caught:
            host.salute(broker_id)
        assert not caught.value.retriable
        assert "raftlog upgrade" in str(caught.value)
        if broker_id < 2:
            with pytest.raises(ConfigError, match="a release that does not know"):
                host.upgrade(NEW_LEVEL)
            answer = host.upgrade()
            assert (answer.level, sorted(answer.known.values())[0]) == (1, 1)
            host.wait(lambda broker_id=broker_id: len(host.versions(broker_id)) == 2)
            expected = {other: 2 if other < broker_id else 1 for other in range(3) if other != broker_id}
            assert host.versions(broker_id) == expected
        sent = writer.sent
        host.wait(lambda sent=sent: writer.sent > sent + 20)
    host.wait(lambda: all(host.metadata(0).machine.brokers[each].level == 2 for each in range(3)))
    assert host.metadata(0).machine.feature_level == 1, "as long as nobody says so"
    assert host.upgrade().level == NEW_LEVEL
    assert host.upgrade().level == NEW_LEVEL, "asked twice"
    host.wait(lambda: all(host.metadata(each).machine.feature_level == NEW_LEVEL for each in range(3)))
    assert [host.salute(each) for each in range(3)] == [1, 2, 3]
    check_records(host, writer.stop())
    host.wait(lambda: all(host.metadata(each).machine == host.metadata(0).machine for each in range(3)))
    assert {version for each in range(3) for version in host.versions(each).values()} == {2}


def test_after_the_upgrade_an_old_release_is_refused(host: Rolling) -> None:
    host.roll(host.two)
    host.upgrade()
    host.salute(0)
    host.wait(lambda: host.is_equal() and host.metadata(2).node.applied == host.metadata(0).node.applied)
    host.cluster.kill_broker(2)
    host.cluster._broker_class = host.one
    with pytest.raises(IncompatibleVersion, match="newer release"):
        host.cluster.start_broker(2)
    host.restart(2, host.two)
    assert host.salute(2) == 2


def test_an_old_broker_that_meets_the_new_command_halts_its_replica_and_no_other(host: Rolling) -> None:
    """It was down while the level was raised, and came back with the release of before."""
    host.roll(host.two)
    host.wait(lambda: all(host.metadata(0).machine.brokers[each].level == 2 for each in range(3)))
    host.let_halt()
    host.cluster.kill_broker(2)
    host.wait(lambda: host.leader_id is not None)
    host.upgrade()
    host.salute(0)
    host.produce(5)
    host.cluster._broker_class = host.one
    host.cluster.start_broker(2)
    host.wait(lambda: host.metadata(2).fault is not None)
    stopped = host.metadata(2).machine.applied_index
    assert "feature level" in str(host.metadata(2).fault)
    host.produce(5)
    host.wait(host.is_equal)
    assert host.replica(2).fault is None, "the topic's replica serves on"
    assert [host.metadata(each).fault for each in (0, 1)] == [None, None]
    # With the new release it goes on from where it was.
    host.cluster.kill_broker(2)
    host.cluster._broker_class = host.two
    host.cluster.start_broker(2)
    host.wait(lambda: host.metadata(2).machine == host.metadata(0).machine)
    assert host.metadata(2).machine.applied_index > stopped
    assert host.metadata(2).machine.salutes == ["hello"]  # type: ignore[attr-defined]


def test_a_partition_whose_log_needs_a_newer_release_waits_for_it(
    host: Rolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on, and so does the broker with all else it has, also when it is started again."""

    class Tidy(ExpireProducers, frozen=True):
        type = 999

    known, newer = partition_module._codec, CommandCodec("partition", SetLogStart, ExpireProducers, Tidy)
    old = host.followers()[0]
    old_nodes = {broker_name(old)}

    def decode(payload: Buffer) -> Any:
        node = current_node.get()
        return (known if node is not None and node.name in old_nodes else newer).decode(payload)

    monkeypatch.setattr(partition_module, "decode_command", decode)
    monkeypatch.setattr(books, "decode_command", newer.decode)
    host.let_halt()
    host.produce(5)
    leader = host.leader
    leader.propose(leader.check_serving(), FrameKind.COMMAND, newer.encode(Tidy(0)), lambda *_: None)
    host.produce(5)
    host.wait(lambda: host.replica(old).fault is not None)
    host.restart(old, host.one)
    broker = host.cluster.brokers[old]
    assert host.find(old) is None
    (row,) = out_of_service_rows(broker)
    assert "needs a newer release" in row.fault
    assert host.metadata(old).fault is None
    host.wait(lambda: host.metadata(old).leader_broker is not None)
    assert isinstance(host.cluster.run(broker.metadata.call(AllocateProducerIds(1))), int)
    host.produce(5)
    old_nodes.clear()
    host.restart(old, host.one)
    host.wait(host.is_equal)
    check_end(host)


def check_end(host: Host) -> None:
    assert [record.offset for record in host.consume()] == list(range(host.count))


def test_leaders_propose_no_partition_command_above_the_level(
    host: Rolling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpireProducers, "needs_level", NEW_LEVEL)
    host.roll(host.two)
    host.produce(5)
    leader = host.leader
    staged = leader.check_serving()
    assert staged.producers
    with pytest.raises(NeedsUpgrade):
        leader._command(staged, ExpireProducers(1 << 60))
    host.upgrade()
    host.wait(lambda: leader.host.feature_level == NEW_LEVEL)
    leader._command(staged, ExpireProducers(1 << 60))
    host.wait(lambda: not any(host.replica(each).machine.producers for each in range(3)))


def test_a_cluster_founded_by_the_new_release_runs_at_its_level() -> None:
    made = Rolling(2)
    assert made.metadata(0).machine.feature_level == FEATURE_LEVEL_MAX
    made.close()


def test_a_topic_with_settings_of_a_newer_release_holds_up_no_other(host: Rolling) -> None:
    create = CreateTopic("odd", b"o" * 16, {"colour": "red"}, False, [[0, 1, 2]])
    leader = next(each for each in host.cluster.brokers.values() if each.metadata.replica.staged is not None)
    host.cluster.run(leader.metadata.call(create), node=broker_name(leader.broker_id))
    host.cluster.run(host.replace_topic(), node="admin")
    host.count = 0
    host.wait(host.is_equal)
    host.produce(5)
    host.roll(host.two)
    host.wait(host.is_equal)
    check_end(host)


@pytest.mark.parametrize("versions", [(2, 2), (3, 5)])
def test_brokers_without_a_common_rpc_version_do_not_talk(host: Rolling, versions: tuple[int, int]) -> None:
    class Far(host.one):  # type: ignore[name-defined, misc]
        rpc_versions = versions

    host.cluster.kill_broker(2)
    host.cluster._broker_class = Far
    host.cluster.start_broker(2)
    host.loop.run_for(3.0)
    assert host.cluster.brokers[2].alive_brokers() == {2}
    host.produce(5)
    with pytest.raises(RaftlogError):
        host.cluster.run(host.cluster.brokers[2].metadata.call(AllocateProducerIds(1)))
    host.restart(2, host.one)
    host.wait(host.is_equal)


class Old(Struct, frozen=True):
    a: int
    b: str = "none"


class New(Struct, frozen=True):
    a: int
    b: str = "none"
    c: tuple[int, ...] = ()


def test_a_field_at_the_end_of_a_struct_is_read_by_both_releases() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(New(1, "x", (2,))), type=Old) == Old(1, "x")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Old(1, "x")), type=New) == New(1, "x", ())
