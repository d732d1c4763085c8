"""What the sender has for a broker in one turn of the loop goes in one request, for all partitions that this
broker leads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from raftlog.client.accumulator import ProducerBatch
from raftlog.errors import ProtocolError, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.frames import Buffer
from raftlog.net.rpc import Produced, ProducePartition, ProduceRequest, ProduceResponse

REQUEST_BYTES_MAX: Final = 1024 * 1024
"""Batches beyond it go into another request: a broker takes a request when all of it has come."""

Answered: TypeAlias = (
    "Callable[[Flight, ProduceResponse | None, memoryview | None, RaftlogError | None], None]"
)


class Flight:
    """A request: gathered, then under way until each of its batches is answered."""

    __slots__ = ("_attempts", "_batches", "_lengths", "_partitions", "_pieces", "connection", "size")

    def __init__(self, connection: RpcConnection) -> None:
        self.connection = connection
        self.size = 0
        self._partitions: list[ProducePartition] = []
        self._lengths: list[int] = []
        self._pieces: list[Buffer] = []
        self._batches: dict[int, ProducerBatch] = {}
        """By number; those that are not answered."""
        self._attempts: list[int] = []

    def add(self, partition: ProducePartition, batch: ProducerBatch, size: int) -> None:
        """One more batch, of ``size`` bytes."""
        self._batches[len(self._attempts)] = batch
        self._attempts.append(batch.attempt)
        self._partitions.append(partition)
        self._lengths.append(size)
        self._pieces += batch.encoded
        self.size += size

    def depart(self, acks: int) -> tuple[ProduceRequest, list[Buffer]]:
        """The request and its payload, which are not kept."""
        request = ProduceRequest(self._partitions, self._lengths[:-1], acks)
        pieces, self._pieces = self._pieces, []
        return request, pieces

    def is_current(self, number: int, batch: ProducerBatch) -> bool:
        """Whether an answer to that batch is news: it was not given up, or sent again, meanwhile."""
        return not batch.done and self._attempts[number] == batch.attempt

    def take(self, response: ProduceResponse) -> list[tuple[int, ProducerBatch, Produced]]:
        """The batches that a response answers, with their numbers.

        Raises:
            ProtocolError: it does not fit the request, or what was answered before.
        """
        batches, produced, numbers = self._batches, response.batches, response.numbers
        if not numbers:
            numbers = list(batches)
        elif len(set(numbers)) != len(numbers) or not batches.keys() >= set(numbers):
            raise ProtocolError(f"an answer to batches {numbers}, of which {list(batches)} are under way")
        if len(numbers) != len(produced):
            raise ProtocolError(f"{len(produced)} answers to {len(numbers)} batches")
        return [(number, batches.pop(number), each) for number, each in zip(numbers, produced, strict=True)]

    def take_rest(self) -> list[tuple[int, ProducerBatch]]:
        """The batches that are not answered, and will not be."""
        batches, self._batches = self._batches, {}
        return list(batches.items())


class Outbox:
    """The requests that are being gathered.

    Args:
        answered: told the answer to each, in parts if it comes so; as of ``RpcConnection.ask``. None: there
            are no answers (acks=0).
    """

    def __init__(self, answered: Answered | None) -> None:
        self._answered = answered
        self._gathered: dict[RpcConnection, Flight] = {}

    def add(self, connection: RpcConnection, partition: ProducePartition, batch: ProducerBatch) -> None:
        """Put a batch into the request for that broker, which leaves with the next :meth:`flush`, or now if
        it is large."""
        size = sum(map(len, batch.encoded))
        flight = self._gathered.get(connection)
        if flight is not None and flight.size + size > REQUEST_BYTES_MAX:
            self._send(self._gathered.pop(connection))
            flight = None
        if flight is None:
            flight = self._gathered[connection] = Flight(connection)
        flight.add(partition, batch, size)

    def flush(self) -> None:
        """Send what was gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, {}
            for flight in gathered.values():
                self._send(flight)

    def _send(self, flight: Flight) -> None:
        connection, answered = flight.connection, self._answered
        if answered is not None:
            connection.ask(*flight.depart(-1), partial(answered, flight))
        elif not connection.closed:
            connection.send(*flight.depart(0))
