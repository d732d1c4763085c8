"""The table of bad input, as a user of a real broker meets it: one test per row, and each ends with a valid
request that succeeds.

The rows about producers' sequences are in ``test_broker_produce``, those about data directories and full
disks in ``test_bad_data_dir`` and ``test_disk_full``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from broker_kit import batch, create_request
from crc32c import crc32c

from raftlog.client.log import Log
from raftlog.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    CorruptBatch,
    IncompatibleVersion,
    InvalidRecord,
    InvalidReplicationFactor,
    InvalidTopic,
    RaftlogError,
    RecordTooLarge,
    StaleIncarnation,
    UnknownPartition,
    UnknownTopic,
)
from raftlog.net.connection import RpcConnection
from raftlog.net.frames import FRAME_BYTES_MAX, PREFIX, Kind
from raftlog.net.handshake import Local
from raftlog.net.network import real_seams
from raftlog.net.rpc import MetadataRequest, ProducePartition, ProduceRequest, ProduceResponse
from raftlog.record.batch import ATTRIBUTES_AT
from raftlog.testing.local_cluster import LocalCluster

TOPIC = "orders"
AT_ONCE_S = 5.0
LIMIT = 4_096


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """One broker with a topic of two partitions."""
    with LocalCluster(brokers=1) as cluster:
        cluster.log.create_topic(TOPIC, partitions=2, config={"max_message_bytes": LIMIT})
        yield cluster


@pytest.fixture
def log(cluster: LocalCluster) -> Log:
    return cluster.log


def works(log: Log, topic: str = TOPIC) -> None:
    """The next valid request succeeds: what is written now is read back."""
    with log.producer(linger_ms=0) as producer:
        written = producer.send(topic, b"valid", partition=0).result(timeout=10)
    with log.consumer(assign=[(topic, 0)]) as consumer:
        consumer.seek((topic, 0), written.offset)
        assert [record.value for record in consumer.poll(timeout=10)] == [b"valid"]


def end_offset(log: Log, partition: int = 0) -> int:
    """Where the log ends, committed or not."""
    return log.describe_topic(TOPIC).partitions[partition].end_offset


# -- unknown topic, partition out of range, invalid name or config -------------------------------------------

WRONG_NAMES: dict[str, tuple[type[RaftlogError], str, Callable[[Log], object]]] = {
    "describe": (UnknownTopic, "nowhere", lambda log: log.describe_topic("nowhere")),
    "delete": (UnknownTopic, "nowhere", lambda log: log.delete_topic("nowhere")),
    "consume": (UnknownTopic, "nowhere", lambda log: log.consumer("nowhere")),
    "name with a blank": (InvalidTopic, "a b", lambda log: log.create_topic("a b")),
    "no name": (InvalidTopic, "''", lambda log: log.create_topic("")),
    "a name of dots": (InvalidTopic, "'..'", lambda log: log.create_topic("..")),
    "a name too long": (InvalidTopic, "xxx", lambda log: log.create_topic("x" * 250)),
    "the brokers' own": (InvalidTopic, "__metadata", lambda log: log.create_topic("__metadata")),
    "misspelt setting": (
        ConfigError,
        "retention_ms",
        lambda log: log.create_topic("t", config={"retenton_ms": 1}),
    ),
    "setting out of range": (
        ConfigError,
        "segment_bytes",
        lambda log: log.create_topic("t", config={"segment_bytes": 1}),
    ),
    "setting of an unknown value": (
        ConfigError,
        "flush='sometimes'",
        lambda log: log.create_topic("t", config={"flush": "sometimes"}),
    ),
    "no partitions": (ConfigError, "0", lambda log: log.create_topic("t", partitions=0)),
    "too many partitions": (
        ConfigError,
        "99999999",
        lambda log: log.create_topic("t", partitions=99_999_999),
    ),
    "partition above": (UnknownPartition, "2", lambda log: log.consumer(assign=[(TOPIC, 2)])),
    "partition below": (UnknownPartition, "-1", lambda log: log.consumer(assign=[(TOPIC, -1)])),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_unknown_topic_partition_out_of_range_invalid_name_or_config(log: Log, case: str) -> None:
    """Its typed error at once, naming it."""
    expected, named, wrong = WRONG_NAMES[case]
    start = time.monotonic()
    with pytest.raises(expected) as caught:
        wrong(log)
    assert time.monotonic() - start < AT_ONCE_S
    assert type(caught.value) is expected
    assert named in str(caught.value)
    assert not caught.value.retriable
    assert log.topics() == [TOPIC]
    works(log)


@pytest.mark.parametrize(
    ("topic", "partition", "expected"),
    [("nowhere", None, UnknownTopic), ("a b", None, InvalidTopic), (TOPIC, 2, UnknownPartition)],
)
def test_unknown_topic_or_partition_out_of_range_of_a_producer(
    log: Log, topic: str, partition: int | None, expected: type[RaftlogError]
) -> None:
    """From ``send`` itself, and the same producer goes on."""
    with log.producer(linger_ms=0) as producer:
        start = time.monotonic()
        with pytest.raises(expected):
            producer.send(topic, b"x", partition=partition)
        with pytest.raises(expected):
            producer.send_batch(topic, [b"x"], partition=partition)
        assert time.monotonic() - start < AT_ONCE_S
        assert producer.send(TOPIC, b"valid").result(timeout=10)


RAW_CREATIONS: dict[str, tuple[type[RaftlogError], Any]] = {
    "name": (InvalidTopic, create_request("../../etc")),
    "setting": (ConfigError, create_request("t", config={"colour": "red"})),
    "value": (ConfigError, create_request("t", config={"max_message_bytes": "much"})),
    "value of a strange type": (ConfigError, create_request("t", config={"retention_ms": [1, {"a": 2}]})),
    "partitions below": (ConfigError, create_request("t", partitions=-1)),
    "partitions above": (ConfigError, create_request("t", partitions=2**40)),
    "replication below": (InvalidReplicationFactor, create_request("t", replication=-1)),
    "replication above": (InvalidReplicationFactor, create_request("t", replication=2**40)),
}


@pytest.mark.parametrize("case", RAW_CREATIONS)
def test_a_client_that_checks_nothing_is_checked_by_the_broker(cluster: LocalCluster, case: str) -> None:
    expected, request = RAW_CREATIONS[case]

    async def main() -> None:
        async with dialed(cluster) as connection:
            with pytest.raises(expected):
                await connection.call(request, timeout=AT_ONCE_S)
            assert (await connection.call(MetadataRequest(None), timeout=5))[0].topics[0].name == TOPIC

    asyncio.run(main())
    works(cluster.log)


# -- record or batch too large; value not bytes --------------------------------------------------------------

BAD_RECORDS: dict[str, tuple[type[RaftlogError], dict[str, Any]]] = {
    "record too large": (RecordTooLarge, {"value": b"x" * LIMIT}),
    "key too large": (RecordTooLarge, {"value": b"", "key": b"x" * LIMIT}),
    "value a str": (InvalidRecord, {"value": "text"}),
    "value a dict": (InvalidRecord, {"value": {"a": 1}}),
    "key an int": (InvalidRecord, {"value": b"", "key": 5}),
    "headers no pairs": (InvalidRecord, {"value": b"", "headers": [b"x"]}),
    "header a str": (InvalidRecord, {"value": b"", "headers": [("a", "b")]}),
    "timestamp no time": (InvalidRecord, {"value": b"", "timestamp_ms": -5}),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_record_too_large_or_value_not_bytes(log: Log, case: str) -> None:
    """The error comes from ``send``; nothing is buffered, then or later."""
    expected, record = BAD_RECORDS[case]
    before = end_offset(log)
    with log.producer(linger_ms=60_000) as producer:
        good = producer.send(TOPIC, b"before", partition=0)
        used = producer._core.accumulator.used
        with pytest.raises(expected):
            producer.send(TOPIC, partition=0, **record)
        assert producer._core.accumulator.used == used
        assert not good.done()
        after = producer.send(TOPIC, b"after", partition=0)
        producer.flush()
        assert (good.result().offset, after.result().offset) == (before, before + 1)
    assert end_offset(log) == before + 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [([b"ok", b"x" * LIMIT], RecordTooLarge), ([b"ok", "text"], InvalidRecord), ([b"ok", 7], InvalidRecord)],
)
def test_batch_with_a_bad_record(log: Log, values: list[Any], expected: type[RaftlogError]) -> None:
    """Not even the good records of it are written."""
    before = end_offset(log)
    with log.producer() as producer:
        with pytest.raises(expected):
            producer.send_batch(TOPIC, values, partition=0)
        assert producer._core.accumulator.used == 0
        (written,) = producer.send_batch(TOPIC, [b"valid"], partition=0).result(timeout=10)
        assert (written.base_offset, written.count) == (before, 1)


# -- corrupt batch -------------------------------------------------------------------------------------------


@asynccontextmanager
async def dialed(
    cluster: LocalCluster, local: Local | None = None, *, secret: bytes | None = None, purpose: str = "client"
) -> AsyncIterator[RpcConnection]:
    """A connection of bare rpcs."""
    closed = asyncio.Event()
    bootstrap = cluster.bootstrap
    connection = await RpcConnection.open(
        real_seams(),
        *bootstrap.addresses[0],
        local or Local(bootstrap.cluster_id, "client", client_id="raw"),
        bootstrap.secret if secret is None else secret,
        purpose=purpose,
        on_close=lambda _connection, _error: closed.set(),
    )
    try:
        yield connection
    finally:
        connection.close()
        await asyncio.wait_for(closed.wait(), 5)


async def lost(connection: RpcConnection) -> None:
    """Wait until the broker has closed it."""
    with contextlib.suppress(ConnectionLost):
        while True:
            await connection.call(MetadataRequest([]), timeout=5)
    assert connection.closed


def topic_id(cluster: LocalCluster) -> bytes:
    return bytes.fromhex(cluster.log.describe_topic(TOPIC).topic_id)


CRC_AT: Final = ATTRIBUTES_AT - 4


def changed(at: int, value: bytes, *, crc: bool = False) -> bytes:
    """A good batch with some bytes replaced; ``crc``: and its checksum made to fit."""
    data = bytearray(batch(b"one", b"two", producer=70_000, sequence=0))
    data[at : at + len(value)] = value
    if crc:
        struct.pack_into(">I", data, CRC_AT, crc32c(memoryview(data)[ATTRIBUTES_AT:]))
    return bytes(data)


GOOD = batch(b"one", b"two", producer=70_000, sequence=0)
CORRUPT: dict[str, bytes] = {
    "empty": b"",
    "too short": GOOD[:40],
    "cut": GOOD[:-1],
    "too long": GOOD + b"x",
    "two batches": GOOD + GOOD,
    "a flipped byte": changed(len(GOOD) - 3, bytes([GOOD[-3] ^ 0x40])),
    "a wrong checksum": changed(CRC_AT, b"\0\0\0\0"),
    "magic 1": changed(16, b"\1"),
    "a negative length": changed(8, struct.pack(">i", -7)),
    "a control batch": changed(ATTRIBUTES_AT, struct.pack(">h", 0x20), crc=True),
    "an unknown attribute": changed(ATTRIBUTES_AT, struct.pack(">h", 0x100), crc=True),
    "an unknown compression": changed(ATTRIBUTES_AT, struct.pack(">h", 7), crc=True),
    "count and delta differ": changed(23, struct.pack(">i", 9), crc=True),
    "no records": changed(57, struct.pack(">i", 0), crc=True),
    "a sequence without a producer": changed(43, struct.pack(">q", -1), crc=True),
    "a negative epoch": changed(51, struct.pack(">h", -1), crc=True),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_batch(cluster: LocalCluster, case: str) -> None:
    """That request fails; the next one on the same connection succeeds, the log holds nothing of it."""
    before = end_offset(cluster.log, 1)
    request = ProduceRequest([ProducePartition(topic_id(cluster), 1)])

    async def main() -> int:
        async with dialed(cluster) as connection:
            with pytest.raises(CorruptBatch) as caught:
                await connection.call(request, (CORRUPT[case],), timeout=5)
            assert not caught.value.indeterminate
            response: ProduceResponse = (await connection.call(request, (batch(b"valid"),), timeout=5))[0]
            return response.batches[0].base_offset

    assert asyncio.run(main()) == before
    assert end_offset(cluster.log, 1) == before + 1
    works(cluster.log)


# -- oversized or garbage frame, wrong secret, old incarnation, unknown rpc version --------------------------


def frame(
    kind: int = Kind.REQUEST,
    api: int = 10,
    version: int = 1,
    header: bytes = b"\x90",
    length: int | None = None,
) -> bytes:
    """A frame made by hand."""
    size = PREFIX.size - 4 + len(header) if length is None else length
    return PREFIX.pack(size, kind, api, version, 0, 1, len(header)) + header


GARBAGE: dict[str, tuple[bytes, str]] = {
    "oversized": (frame(length=FRAME_BYTES_MAX), "above the limit"),
    "garbage": (b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n", "received"),
    "unknown kind": (frame(kind=77), "kind 77"),
    "header longer than its frame": (frame(length=12 + 0) + b"\0" * 64, "garbage"),
    "a hello again": (frame(kind=Kind.HELLO), "kind 1"),
    "unknown rpc version": (frame(version=9), "rpc version 9"),
    "a request that does not decode": (frame(header=b"\xc1"), "does not decode"),
    "a request of wrong types": (frame(header=b"\x93\x01\x02\x03"), "does not decode"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_oversized_or_garbage_frame(
    cluster: LocalCluster, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is closed with a reason in the log; others do not notice."""
    data, reason = GARBAGE[case]

    async def main() -> None:
        async with dialed(cluster) as other, dialed(cluster) as connection:
            await connection.call(MetadataRequest([]), timeout=5)
            assert connection._transport is not None
            connection._transport.write(data)
            await lost(connection)
            await other.call(MetadataRequest([]), timeout=5)

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        asyncio.run(main())
    closing = [record.getMessage() for record in caplog.records if record.getMessage().startswith("closed")]
    assert len(closing) == 1, closing
    assert reason in closing[0]
    assert "client 'raw'" in closing[0]
    works(cluster.log)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 16, b"\xff" * 5_000, frame(), frame(kind=Kind.PROOF)]
)
def test_garbage_instead_of_a_handshake(
    cluster: LocalCluster, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(*cluster.bootstrap.addresses[0])
        try:
            writer.write(data)
            return await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            return b""
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        assert asyncio.run(main()) == b"", "a stranger is told nothing"
    assert "closed" in caplog.text
    works(cluster.log)


def refused(
    cluster: LocalCluster, expected: type[RaftlogError], dial: Callable[[], Awaitable[object]]
) -> RaftlogError:
    async def main() -> RaftlogError:
        with pytest.raises(expected) as caught:
            await dial()
        return caught.value

    return asyncio.run(main())


def test_wrong_secret(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    async def dial() -> None:
        async with dialed(cluster, secret=b"x" * 32):
            raise AssertionError("a stranger came in")

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        assert not refused(cluster, AuthenticationFailed, dial).retriable
    assert "refused client 'raw'" in caplog.text
    assert "secret" in caplog.text
    assert cluster.bootstrap.secret.hex() not in caplog.text
    works(cluster.log)


def test_a_peer_of_another_cluster(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    async def dial() -> None:
        async with dialed(cluster, Local("another", "client", client_id="raw")):
            raise AssertionError("a stranger came in")

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        refused(cluster, AuthenticationFailed, dial)
    assert "'another'" in caplog.text
    works(cluster.log)


def test_unknown_rpc_version(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    async def dial() -> None:
        cluster_id = cluster.bootstrap.cluster_id
        async with dialed(cluster, Local(cluster_id, "client", -1, "raw", version_min=90, version_max=99)):
            raise AssertionError("there is no common version")

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        error = refused(cluster, IncompatibleVersion, dial)
    assert "90 to 99" in str(error)
    assert "90 to 99" in caplog.text
    works(cluster.log)


def test_old_incarnation(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """The newer one closes what the older one has open, and the older one does not come in again."""

    def local(incarnation: int) -> Local:
        return Local(cluster.bootstrap.cluster_id, "broker", 9, "broker-9", incarnation)

    async def main() -> RaftlogError:
        async with dialed(cluster, local(5), purpose="control") as older:
            await older.call(MetadataRequest([]), timeout=5)
            async with dialed(cluster, local(6), purpose="control") as newer:
                await lost(older)
                with pytest.raises(StaleIncarnation) as caught:
                    async with dialed(cluster, local(5), purpose="control"):
                        raise AssertionError("the older one came in")
                await newer.call(MetadataRequest([]), timeout=5)
        return caught.value

    with caplog.at_level(logging.WARNING, "raftlog.net"):
        error = asyncio.run(main())
    assert (error.incarnation, error.newest, error.fatal) == (5, 6, True)
    assert "closed broker 9.5 (control): incarnation 6 has connected" in caplog.text
    assert "refused broker 9.5" in caplog.text
    works(cluster.log)


# -- replication factor above the number of brokers ----------------------------------------------------------


def test_replication_factor_above_the_number_of_brokers(log: Log) -> None:
    with pytest.raises(InvalidReplicationFactor, match=r"\b5\b.*\b1\b.*number of brokers") as caught:
        log.create_topic("wide", replication_factor=5)
    assert (caught.value.replication_factor, caught.value.brokers) == (5, 1)
    assert log.topics() == [TOPIC]
    log.create_topic("narrow", replication_factor=1)
    works(log, "narrow")
    log.delete_topic("narrow")
