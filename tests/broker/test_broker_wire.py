"""Raft messages on the wire: what is sent is what arrives, and nothing else is let through."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from broker_kit import World, batch
from hypothesis import given
from hypothesis import strategies as st

from raftlog.broker.wire import decode_messages, encode_messages
from raftlog.errors import ProtocolError
from raftlog.net.rpc import Addresses, RaftMessages
from raftlog.raft import types as t
from raftlog.record.frame import FrameKind

u31 = st.integers(0, t.TERM_MAX)
u63 = st.integers(0, 2**63 - 1)
u32 = st.integers(0, 2**32 - 1)
ids = st.lists(u63, max_size=3).map(tuple)
head = {"to": u63, "sender": u63, "term": u31}
confs = st.builds(t.ConfState, ids, ids, ids, ids, st.booleans())
snapshots = st.builds(t.Snapshot, u63, u31, u32, confs, st.binary(max_size=50))


@st.composite
def append_requests(draw: st.DrawFn) -> t.AppendRequest:
    prev_index = draw(st.integers(0, 2**40))
    prev_crc = crc = draw(u32)
    entries = []
    for position, payload in enumerate(draw(st.lists(st.binary(max_size=60), max_size=4)), 1):
        entry = t.Entry.create(crc, FrameKind.BATCH, draw(u31), prev_index + position, draw(u63), payload)
        entries.append(entry)
        crc = entry.crc
    return t.AppendRequest(
        draw(u63), draw(u63), draw(u31), prev_index, draw(u31), prev_crc, draw(u63), tuple(entries)
    )


FLAT = [
    st.builds(
        t.VoteRequest, **head, last_index=u63, last_term=u31, pre=st.booleans(), transfer=st.booleans()
    ),
    st.builds(t.VoteResponse, **head, granted=st.booleans(), pre=st.booleans()),
    st.builds(t.AppendResponse, **head, index=u63, rejected=st.booleans(), hint_index=u63, hint_term=u31),
    st.builds(t.Heartbeat, **head, commit=u63, context=u63),
    st.builds(t.HeartbeatResponse, **head, context=u63, last_index=u63),
    st.builds(t.InstallSnapshot, **head, snapshot=snapshots, position=u63, total=u63),
    st.builds(t.InstallSnapshotResponse, **head, index=u63, position=u63, rejected=st.booleans()),
    st.builds(t.TimeoutNow, **head),
    st.builds(t.ReadIndexRequest, **head, context=u63),
    st.builds(t.ReadIndexResponse, **head, context=u63, index=u63),
]
MESSAGES = st.one_of(append_requests(), *FLAT)


def travel(messages: list[t.Message]) -> tuple[RaftMessages, bytes]:
    """The frame's header as the receiver decodes it, and its payload."""
    header, buffers = encode_messages(messages)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(header), type=RaftMessages)
    return decoded, b"".join(buffers)


def as_plain(message: t.Message) -> Any:
    """Comparable: an entry's frame is bytes on one side and a view on the other."""
    if isinstance(message, t.AppendRequest):
        fields = msgspec.structs.asdict(message)
        fields["entries"] = [bytes(entry.frame) for entry in message.entries]
        return fields
    return message


def test_the_strategies_know_every_message() -> None:
    made = {strategy.wrapped_strategy.target for strategy in FLAT}
    assert made | {t.AppendRequest} == set(t.Message.__args__)


@given(st.lists(MESSAGES, max_size=6))
def test_what_is_sent_is_what_arrives(messages: list[t.Message]) -> None:
    header, payload = travel(messages)
    found = decode_messages(header, memoryview(payload))
    assert list(map(as_plain, found)) == list(map(as_plain, messages))
    assert list(map(type, found)) == list(map(type, messages))


@given(append_requests())
def test_entries_arrive_as_views_of_what_was_received(message: t.AppendRequest) -> None:
    header, payload = travel([message])
    received = memoryview(payload)
    (found,) = decode_messages(header, received)
    assert isinstance(found, t.AppendRequest)
    for entry, sent in zip(found.entries, message.entries, strict=True):
        assert isinstance(entry.frame, memoryview)
        assert entry.frame.obj is received.obj
        assert (entry.index, entry.term, entry.crc, entry.payload) == (
            sent.index,
            sent.term,
            sent.crc,
            sent.payload,
        )


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
rows = anything | st.builds(
    lambda tag, rest: [tag, *rest], st.integers(0, 12), st.lists(anything, max_size=8)
)


@given(st.lists(rows, max_size=3), st.lists(st.integers(-50, 50), max_size=3), st.binary(max_size=60))
def test_rubbish_is_refused_or_well_formed(messages: list[Any], lengths: list[int], payload: bytes) -> None:
    """Whatever comes through is a message whose fields have the types that the core counts on."""
    try:
        found = decode_messages(RaftMessages(messages, lengths), memoryview(payload))
    except ProtocolError:
        return
    for message in found:
        if not isinstance(message, t.AppendRequest):
            cls = type(message)
            assert msgspec.convert(msgspec.to_builtins(message), cls) == message


@given(append_requests(), st.data())
def test_a_flipped_bit_in_an_entry_is_found(message: t.AppendRequest, data: st.DataObject) -> None:
    header, payload = travel([message])
    if not payload:
        return
    damaged = bytearray(payload)
    damaged[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        decode_messages(header, memoryview(damaged))


def entry(index: int, prev_crc: int = 0) -> t.Entry:
    return t.Entry.create(prev_crc, FrameKind.BATCH, 1, index, 0, b"payload")


ROW = [3, 5, 6, 1, 0, 0, 0, 0]
FRAME = bytes(entry(1).frame)
APART = FRAME + bytes(entry(3, entry(1).crc).frame)

HOSTILE: dict[str, tuple[list[Any], list[int], bytes]] = {
    "unknown tag": ([[99, 1, 2, 3]], [], b""),
    "no tag": ([[]], [], b""),
    "not a list": ([17], [], b""),
    "a map": ([{"t": 5}], [], b""),
    "a tag that cannot be looked up": ([[[5], 1, 2, 3, 4, 0]], [], b""),
    "too few fields": ([[5, 1, 2]], [], b""),
    "a text for a term": ([[5, 1, 2, "3", 4, 0]], [], b""),
    "a list for a replica": ([[5, [1], 2, 3, 4, 0]], [], b""),
    "null for a bool": ([[2, 1, 2, 3, None, False]], [], b""),
    "a float for an index": ([[3, 5, 6, 1, 0.5, 0, 0, 0]], [0], b""),
    "a snapshot without a configuration": ([[7, 1, 2, 3, [1, 1, 1], 0, 0]], [], b""),
    "fewer bytes than announced": ([ROW], [len(FRAME)], FRAME[:-1]),
    "more bytes than announced": ([ROW], [len(FRAME)], FRAME + b"x"),
    "lengths below nothing": ([ROW, ROW], [-len(FRAME), 2 * len(FRAME)], FRAME),
    "no length for an append": ([ROW], [], b""),
    "a length too many": ([ROW], [len(FRAME), 0], FRAME),
    "bytes that nobody claims": ([], [len(FRAME)], FRAME),
    "a cut entry": ([ROW], [len(FRAME) - 3], FRAME[:-3]),
    "entries that do not follow": ([[3, 5, 6, 1, 4, 0, 0, 0]], [len(FRAME)], FRAME),
    "entries with a gap": ([ROW], [len(APART)], APART),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_a_protocol_error(case: str) -> None:
    messages, lengths, payload = HOSTILE[case]
    with pytest.raises(ProtocolError):
        decode_messages(RaftMessages(messages, lengths), memoryview(payload))


def test_fields_of_a_later_release_are_passed_over() -> None:
    """New fields are added at the end: a rolling upgrade sends them to this release."""
    sent = t.Heartbeat(1, 2, 3, 4, 5)
    row = [*msgspec.to_builtins(sent), "new", 7]
    (found,) = decode_messages(RaftMessages([row], []), memoryview(b""))
    assert found == sent


# -- at a broker ---------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    with World(brokers=3) as made:
        yield made


@pytest.mark.parametrize("case", ["unknown tag", "a text for a term", "a cut entry"])
def test_a_broker_that_sends_rubbish_loses_its_connection_and_nothing_else(
    world: World, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    leader = world.leader()
    writer = world.dial(leader)
    peer = world.dial(leader, "broker", as_broker=9, incarnation=1, purpose="bulk")
    messages, lengths, payload = HOSTILE[case]
    with caplog.at_level(logging.WARNING, "raftlog"):
        world.tell(peer, RaftMessages(messages, lengths), (payload,))
        world.until(lambda: peer.closed)
    assert any("broker 9" in each.getMessage() and "closed" in each.getMessage() for each in caplog.records)
    assert world.written(writer, batch(b"a")) == 0
    again = world.dial(leader, "broker", as_broker=9, incarnation=1, purpose="bulk")
    assert world.written(again, batch(b"b")) == 1


@pytest.mark.parametrize(
    "message",
    [RaftMessages([[9, 1, 2, 3]], []), Addresses({0: (99, "elsewhere", 1)})],
    ids=["raft", "addresses"],
)
def test_a_client_that_poses_as_a_broker_is_closed(
    world: World, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    leader = world.leader()
    client, writer = world.dial(leader), world.dial(leader)
    terms = {broker.metadata.replica.node.term for broker in world.cluster.brokers.values()}
    with caplog.at_level(logging.WARNING, "raftlog"):
        world.tell(client, message)
        world.until(lambda: client.closed)
    assert "from a client" in caplog.text
    assert world.written(writer, batch(b"a")) == 0
    assert world.broker(leader).address[1] == f"broker-{leader}"
    assert {broker.metadata.replica.node.term for broker in world.cluster.brokers.values()} == terms


def test_a_message_for_a_replica_that_is_not_here_is_dropped(world: World) -> None:
    leader = world.leader()
    peer = world.dial(leader, "broker", as_broker=9, incarnation=1, purpose="bulk")
    world.tell(peer, RaftMessages([[5, 987654, 2, 3, 4, 0]], []))
    assert world.written(peer, batch(b"the connection stands")) == 0
