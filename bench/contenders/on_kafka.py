"""Apache Kafka: three brokers that are controllers too (KRaft), confluent-kafka.

The jars are those of ``KAFKA_HOME`` (an unpacked release), or what Maven resolves from ``kafka.pom.xml``,
once, into the user's cache.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from platformdirs import user_cache_path

from contenders.base import (
    MESSAGE_BYTES_MAX,
    REPLICAS,
    UNCOUNTED,
    Contender,
    System,
    Turn,
    Unavailable,
    free_ports,
    listens,
    pace,
    stepwise,
)

POM: Final = Path(__file__).parents[1] / "kafka.pom.xml"
RESOLVE_TIMEOUT_S: Final = 300.0
TIMEOUT_S: Final = 30.0
HEAP: Final = (
    "-Xms512m",
    "-Xmx512m",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:+ExplicitGCInvokesConcurrent",
)
BRIEF: Final = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""Of a Java that does little and ends."""
CONSUMED: Final = 10_000
PRODUCER: Final[dict[str, Any]] = {
    "acks": "all",
    "enable.idempotence": True,
    "compression.type": "none",
    "message.max.bytes": MESSAGE_BYTES_MAX,
}
BULK: Final[dict[str, Any]] = PRODUCER | {
    "linger.ms": 50,
    "batch.size": 1 << 20,
    "batch.num.messages": 100_000,
    "queue.buffering.max.messages": 1_000_000,
    "queue.buffering.max.kbytes": 256 << 10,
}
AT_ONCE: Final[dict[str, Any]] = PRODUCER | {"linger.ms": 0}
UNDER_LOAD: Final[dict[str, Any]] = BULK | {"linger.ms": 1}
"""0 makes so many requests that it is slower."""
CONSUMER: Final[dict[str, Any]] = {
    "group.id": "bench",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "earliest",
}
BULK_CONSUMER: Final[dict[str, Any]] = CONSUMER | {
    "fetch.max.bytes": 8 << 20,
    "max.partition.fetch.bytes": 8 << 20,
    "queued.min.messages": 1_000_000,
    "queued.max.messages.kbytes": 256 << 10,
}


def jars() -> Path:
    """The folder with Kafka's jars; Maven fetches them where there are none.

    Raises:
        Unavailable: no Java, or no jars and no Maven.
    """
    if shutil.which("java") is None:
        raise Unavailable("Kafka needs Java: there is none on this machine")
    home = os.environ.get("KAFKA_HOME")
    if home:
        return Path(home) / "libs"
    folder = user_cache_path("raftlog-bench") / "kafka"
    if not any(folder.glob("kafka_*.jar")):
        if shutil.which("mvn") is None:
            raise Unavailable("Kafka is not here: set KAFKA_HOME, or install Maven (mvn), which fetches it")
        command = [
            "mvn",
            "-B",
            "-q",
            "-f",
            POM,
            "dependency:copy-dependencies",
            f"-DoutputDirectory={folder}",
        ]
        try:
            subprocess.run(command, check=True, timeout=RESOLVE_TIMEOUT_S, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            raise Unavailable("Maven did not fetch Kafka in time") from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"Maven could not fetch Kafka: {error.stdout[-200:].strip()}") from error
    return folder


class KafkaBrokers(System):
    """Three brokers in combined mode."""

    name = "kafka"

    def __init__(self) -> None:
        super().__init__()
        self.servers = ""
        self._admin: Any = None

    def start(self, directory: Path) -> None:
        if find_spec("confluent_kafka") is None:
            raise Unavailable("confluent-kafka is not installed: pip install confluent-kafka")
        classpath = f"{jars()}/*"
        directory.mkdir()
        ports, controllers = free_ports(REPLICAS), free_ports(REPLICAS)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        files = []
        for number in range(REPLICAS):
            files.append(directory / f"broker-{number}.properties")
            files[-1].write_text(self._properties(number, directory, ports, controllers))
        formats = [
            subprocess.Popen(
                [
                    "java",
                    *BRIEF,
                    "-cp",
                    classpath,
                    "kafka.tools.StorageTool",
                    "format",
                    "-t",
                    cluster,
                    "-c",
                    file,
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for file in files
        ]
        exits = [process.wait(TIMEOUT_S) for process in formats]
        if any(exits):
            raise Unavailable("Kafka cannot format its data directories")
        for file in files:
            self.spawn(["java", *HEAP, "-cp", classpath, "kafka.Kafka", file], file.with_suffix(".txt"))
        self.servers = ",".join(f"127.0.0.1:{port}" for port in ports)
        for port in ports:
            self.wait_until(lambda port=port: listens(port), "it accepts connections")
        self.wait_until(self._is_complete, "all brokers know one another")

    def _properties(self, number: int, directory: Path, ports: list[int], controllers: list[int]) -> str:
        voters = ",".join(f"{each}@127.0.0.1:{port}" for each, port in enumerate(controllers))
        settings = {
            "process.roles": "broker,controller",
            "node.id": number,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://127.0.0.1:{ports[number]},CONTROLLER://127.0.0.1:{controllers[number]}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports[number]}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": directory / f"broker-{number}",
            "default.replication.factor": REPLICAS,
            "offsets.topic.replication.factor": REPLICAS,
            "min.insync.replicas": 2,
            "message.max.bytes": MESSAGE_BYTES_MAX,
            "replica.fetch.max.bytes": MESSAGE_BYTES_MAX,
            "log.segment.delete.delay.ms": 1000,
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())

    def _is_complete(self) -> bool:
        from confluent_kafka import KafkaException

        try:
            return len(self.admin.list_topics(timeout=5.0).brokers) == REPLICAS
        except KafkaException:
            return False

    @property
    def admin(self) -> Any:
        """A client for topics; one, for what is under way ends with it."""
        from confluent_kafka.admin import AdminClient

        if self._admin is None:
            self._admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        return self._admin


class Kafka(Contender):
    """acks=all, at least two replicas in sync."""

    name = "kafka"
    title = "Kafka, unsynced"
    settings = (
        "Kafka 4.1, three KRaft brokers in combined mode with 512 MB of heap each; `acks=all`, "
        "`min.insync.replicas=2`; brokers leave syncing to the operating system. confluent-kafka with "
        "`enable.idempotence`; one record after another: `linger.ms=0`, under half load 1. Throughput: "
        "`batch.size=1 MiB`, `linger.ms=50`, `produce`, or `produce_batch` of dicts made beforehand; "
        "`consume` with 10,000 messages, fetches of 8 MiB"
    )

    def __init__(self, system: KafkaBrokers) -> None:
        super().__init__(system)
        self.brokers = system

    def _producer(self, settings: dict[str, Any]) -> Any:
        from confluent_kafka import Producer

        return Producer({"bootstrap.servers": self.brokers.servers, **settings})

    def _consumer(self, topic: str, settings: dict[str, Any]) -> Any:
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": self.brokers.servers, **settings})
        consumer.assign([TopicPartition(topic, index, OFFSET_BEGINNING) for index in self._partitions(topic)])
        return consumer

    def _partitions(self, topic: str) -> list[int]:
        return list(self.brokers.admin.list_topics(topic, timeout=TIMEOUT_S).topics[topic].partitions)

    def create(self, topic: str, partitions: int) -> None:
        from confluent_kafka.admin import NewTopic

        new = NewTopic(topic, num_partitions=partitions, replication_factor=REPLICAS)
        self.brokers.admin.create_topics([new])[topic].result(TIMEOUT_S)
        self.brokers.wait_until(lambda: self._has_leaders(topic, partitions), f"topic {topic} is ready")

    def _has_leaders(self, topic: str, partitions: int) -> bool:
        found = self.brokers.admin.list_topics(topic, timeout=TIMEOUT_S).topics[topic].partitions
        return len(found) == partitions and all(
            each.leader >= 0 and len(each.isrs) == REPLICAS for each in found.values()
        )

    def delete(self, topic: str) -> None:
        self.brokers.admin.delete_topics([topic])[topic].result(TIMEOUT_S)

    def held(self, topic: str) -> int | None:
        from confluent_kafka import TopicPartition

        consumer = self._consumer(topic, CONSUMER)
        try:
            return sum(
                consumer.get_watermark_offsets(TopicPartition(topic, index), timeout=TIMEOUT_S)[1]
                for index in self._partitions(topic)
            )
        finally:
            consumer.close()

    def sequential(self, topic: str, value: bytes, count: int) -> list[float]:
        producer = self._producer(AT_ONCE)
        return stepwise(lambda: deliver(producer, topic, value), count)

    def send(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn, producer = self.turn(), self._producer(BULK)
        self._warm(producer, topic, values[0])
        with turn.timed():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                for value in values:
                    produce(producer, topic, value)
                turn.add(values)
            drain(producer)
        return turn

    def send_batch(self, topic: str, values: Sequence[bytes], seconds: float) -> Turn:
        turn, producer = self.turn(), self._producer(BULK)
        self._warm(producer, topic, values[0])
        messages = [{"value": value} for value in values]
        with turn.timed():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                rest = messages
                while rest:
                    queued = producer.produce_batch(topic, rest)
                    producer.poll(0 if queued else 0.001)
                    rest = [each for each in rest if each.pop("_error", None)] if queued < len(rest) else []
                turn.add(values)
            drain(producer)
        return turn

    def _warm(self, producer: Any, topic: str, value: bytes) -> None:
        for _ in range(UNCOUNTED):
            deliver(producer, topic, value)

    def paced(self, topic: str, value: bytes, rate: float, seconds: float) -> tuple[list[float], int]:
        producer = self._producer(UNDER_LOAD)
        self._warm(producer, topic, value)

        def fire(acknowledged: Callable[[], None] | None) -> None:
            if acknowledged is None:
                produce(producer, topic, value)
            else:
                producer.produce(topic, value, on_delivery=lambda error, _: acknowledged())

        found = pace(fire, producer.poll, rate, seconds)
        drain(producer)
        return found

    def consume(self, topic: str, count: int) -> Turn:
        consumer = self._consumer(topic, BULK_CONSUMER)
        try:
            turn, left = self.turn(), count

            def poll() -> int:
                nonlocal left
                found = len(consumer.consume(min(CONSUMED, left), timeout=TIMEOUT_S))
                left -= found
                return found

            return turn.read(count, poll)
        finally:
            consumer.close()

    def end_to_end(self, topic: str, value: bytes, count: int) -> list[float]:
        producer, consumer = self._producer(AT_ONCE), self._consumer(topic, CONSUMER)

        def once() -> None:
            producer.produce(topic, value)
            message = consumer.poll(TIMEOUT_S)
            assert message is not None, f"nothing within {TIMEOUT_S:.0f} s"
            assert message.error() is None, message.error()

        try:
            return stepwise(once, count)
        finally:
            drain(producer)
            consumer.close()


def deliver(producer: Any, topic: str, value: bytes) -> None:
    """Produce one message and wait for its acknowledgement."""
    outcome: list[Any] = []
    producer.produce(topic, value, on_delivery=lambda error, _: outcome.append(error))
    while not outcome:
        producer.poll(TIMEOUT_S)
    assert outcome[0] is None, outcome[0]


def produce(producer: Any, topic: str, value: bytes, **where: int) -> None:
    """Produce one message, waiting for room where the client's queue is full."""
    while True:
        try:
            producer.produce(topic, value, **where)
            return
        except BufferError:
            producer.poll(0.001)


def drain(producer: Any) -> None:
    """Wait for every acknowledgement."""
    left = producer.flush(TIMEOUT_S)
    assert left == 0, f"{left} messages were not acknowledged within {TIMEOUT_S:.0f} s"
