"""Clients that reach the brokers' actors, but none of their ports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from msgspec.structs import replace
from ray_nodes import until
from test_failures import all_caught_up, values_of

import raftlog
from raftlog.actors.launch import broker_actor
from raftlog.errors import ConfigError, ConnectionLost, RaftlogError
from raftlog.net.network import RealNetwork


@pytest.fixture
def no_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process dials is refused from now on."""

    async def refuse(self: RealNetwork, factory: Any, host: str, port: int, *, timeout: float) -> Any:
        raise ConnectionLost(f"cannot connect to {host}:{port}: a test forbids it")

    monkeypatch.setattr(RealNetwork, "connect", refuse)


@pytest.fixture
def through_actors(log: raftlog.Log, cluster_name: str, no_ports: None) -> Iterator[raftlog.Log]:
    through = raftlog.connect(cluster_name, transport="actor")
    yield through
    through.close()


def test_auto_takes_the_actors_and_says_so(
    log: raftlog.Log, cluster_name: str, no_ports: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raftlog.client"):
        auto = raftlog.connect(cluster_name, transport="auto")
    assert auto.transport == "actor"
    assert "reached over transport='actor'" in caplog.text
    assert raftlog.connect(cluster_name) is auto, "and is what this process has from now on"
    auto.create_topic("auto")
    with auto.producer() as producer:
        assert producer.send("auto", b"1").result(timeout=30).offset == 0
    auto.close()


def test_auto_takes_streams_where_they_lead_there(
    log: raftlog.Log, cluster_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "raftlog.client"),
        raftlog.connect(cluster_name, transport="auto") as auto,
    ):
        assert auto.transport == "streams"
    assert "reached over transport='streams'" in caplog.text


def test_streams_say_what_else_there_is(log: raftlog.Log, cluster_name: str, no_ports: None) -> None:
    streams = raftlog.Log(replace(log.bootstrap, transport="streams"))  # not the one that has connections
    assert streams.transport == "streams"
    with pytest.raises(RaftlogError, match="transport='actor'"):
        streams.create_topic("nowhere", timeout=2.0)
    streams.close()
    with pytest.raises(ConfigError, match="pigeon"):
        raftlog.connect(cluster_name, transport="pigeon")  # type: ignore[arg-type]


def test_all_of_it_through_actors_while_a_broker_dies(
    log: raftlog.Log, cluster_name: str, through_actors: raftlog.Log
) -> None:
    through = through_actors
    through.create_topic("through", partitions=1)
    through.create_topic("copied", partitions=2)
    with through.producer(linger_ms=1) as producer:
        before = [producer.send("through", b"%d" % n) for n in range(500)]
        producer.flush()
        leader = through.describe_topic("through").partitions[0].leader
        during = [producer.send("through", b"%d" % n) for n in range(500, 1000)]
        ray.kill(broker_actor(cluster_name, leader))
        after = [producer.send("through", b"%d" % n) for n in range(1000, 1500)]
        producer.flush(timeout=60)
    offsets = [delivery.result().offset for delivery in before + during + after]
    assert offsets == list(range(1500)), "in order, nothing lost, nothing doubled"
    assert values_of(through, "through") == [b"%d" % n for n in range(1500)]
    until("all have caught up", lambda: all_caught_up(through, "through"))

    done, victim = 0, None
    with (
        through.producer(transactional_id="copies") as producer,
        through.consumer("through", group="copiers") as consumer,
    ):
        while done < 1500:
            records = consumer.poll(timeout=10.0, max_records=300)
            with producer.transaction() as txn:
                for record in records:
                    txn.send("copied", record.value)
                txn.send_offsets(consumer)
            done += len(records)
            if done >= 600 and victim is None:
                victim = through.describe_topic("through").partitions[0].leader
                ray.kill(broker_actor(cluster_name, victim))
    assert sorted(values_of(through, "copied"), key=int) == [b"%d" % n for n in range(1500)]
    assert not through.describe_group("copiers").members
    assert through.transport == "actor"
    until("all have caught up", lambda: all_caught_up(through, "through"))


def test_large_values_through_actors(log: raftlog.Log, through_actors: raftlog.Log) -> None:
    large = bytes(range(256)) * (20 * 1024 * 4)
    through_actors.create_topic("large", config={"max_message_bytes": 32 * 1024 * 1024})
    with through_actors.producer() as producer:
        assert producer.send("large", large).result(timeout=60).offset == 0
    assert values_of(through_actors, "large") == [large]


def test_a_log_that_was_pickled_goes_the_same_way(log: raftlog.Log, through_actors: raftlog.Log) -> None:
    through_actors.create_topic("pickled")

    @ray.remote(num_cpus=0)
    def produce(log: raftlog.Log) -> str:
        with log.producer() as producer:
            producer.send("pickled", b"1").result(timeout=60)
        return log.transport

    assert ray.get(produce.remote(through_actors), timeout=120) == "actor"
    assert values_of(through_actors, "pickled") == [b"1"]


def test_the_asynchronous_face(log: raftlog.Log, cluster_name: str, no_ports: None) -> None:
    async def main() -> None:
        async with await raftlog.aio.connect(cluster_name, transport="auto") as through:
            assert through.transport == "actor"
            await through.create_topic("asynchronous")
            async with through.producer() as producer:
                assert (await (await producer.send("asynchronous", b"1"))).offset == 0

    asyncio.run(main())


def test_brokers_count_these_clients_too(
    log: raftlog.Log, cluster_name: str, through_actors: raftlog.Log
) -> None:
    through_actors.topics()
    brokers: Callable[[], Any] = lambda: through_actors.describe_cluster().brokers  # noqa: E731
    ids = {
        client
        for broker in brokers()
        for client in ray.get(broker_actor(cluster_name, broker.id).clients.remote(), timeout=30)
    }
    assert len(ids) == 1, "this process"
