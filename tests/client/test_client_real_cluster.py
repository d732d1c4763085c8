"""The client against production brokers: a leader killed in the middle, nothing lost, doubled or
reordered."""

from __future__ import annotations

import threading

from raftlog.record.types import RecordMetadata
from raftlog.testing.local_cluster import LocalCluster

TOPIC = "orders"


def test_a_leader_killed_while_threads_produce_and_another_consumes() -> None:
    with LocalCluster(brokers=3) as cluster:
        log = cluster.log
        log.create_topic(TOPIC, partitions=2)
        placed: dict[bytes, RecordMetadata] = {}
        read: dict[int, list[bytes]] = {0: [], 1: []}
        half = threading.Barrier(3)

        def produce(number: int) -> None:
            values = [b"%d/%04d" % (number, n) for n in range(600)]
            with log.producer(linger_ms=1) as producer:
                deliveries = [producer.send(TOPIC, value, partition=number) for value in values[:300]]
                half.wait(30)
                deliveries += [producer.send(TOPIC, value, partition=number) for value in values[300:]]
                placed.update({v: d.result(timeout=60) for v, d in zip(values, deliveries, strict=True)})

        def consume() -> None:
            with log.consumer(TOPIC) as consumer:
                for record in consumer:
                    read[record.partition].append(record.value)
                    if sum(map(len, read.values())) == 1200:
                        return

        threads = [threading.Thread(target=produce, args=(number,)) for number in range(2)]
        threads.append(threading.Thread(target=consume))
        for thread in threads:
            thread.start()
        half.wait(30)
        leader = log.describe_topic(TOPIC).partitions[0].leader
        assert leader is not None
        cluster.kill_broker(leader)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        for number in range(2):
            expected = [b"%d/%04d" % (number, n) for n in range(600)]
            assert read[number] == expected
            assert [placed[value].offset for value in expected] == list(range(600))
