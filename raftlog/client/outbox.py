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
    """A request: gathered, then under way until each of its batches is answered.

    Attributes:
        connection: where it goes.
        size: bytes of its batches.
        attempts: of each of its batches, by number: which one this is.
    """

    __slots__ = ("_batches", "_lengths", "_partitions", "_pieces", "attempts", "connection", "size")

    def __init__(self, connection: RpcConnection) -> None:
        self.connection = connection
        self.size = 0
        self.attempts: list[int] = []
        self._partitions: list[ProducePartition] = []
        self._lengths: list[int] = []
        self._pieces: list[Buffer] = []
        self._batches: dict[int, ProducerBatch] = {}
        """By number; those that are not answered."""

    def add(self, partition: ProducePartition, batch: ProducerBatch, size: int) -> None:
        """One more batch, of ``size`` bytes."""
        self._batches[len(self.attempts)] = batch
        self.attempts.append(batch.attempt)
        self._partitions.append(partition)
        self._lengths.append(size)
        self._pieces += batch.encoded
        self.size += size

    def send(self, answered: Answered | None) -> None:
        """Let it go; what it carried is not kept."""
        pieces, self._pieces = self._pieces, []
        partitions, lengths = self._partitions, self._lengths[:-1]
        if answered is not None:
            self.connection.ask(ProduceRequest(partitions, lengths), pieces, partial(answered, self))
        elif not self.connection.closed:
            self.connection.send(ProduceRequest(partitions, lengths, 0), pieces)

    def take(self, response: ProduceResponse) -> list[tuple[int, ProducerBatch, Produced]]:
        """The batches that a response answers, with their numbers. Of one that was given up, or sent again,
        meanwhile (see ``attempts``) it is no news.

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
        return list(zip(numbers, map(batches.pop, numbers), produced, strict=True))

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

    __slots__ = ("_answered", "_gathered")

    def __init__(self, answered: Answered | None) -> None:
        self._answered = answered
        self._gathered: dict[RpcConnection, Flight] = {}

    def add(self, connection: RpcConnection, partition: ProducePartition, batch: ProducerBatch) -> None:
        """Put a batch into the request for that broker, which leaves with the next :meth:`flush`, or now if
        it is large."""
        size = sum(map(len, batch.encoded))
        flight = self._gathered.get(connection)
        if flight is not None and flight.size + size > REQUEST_BYTES_MAX:
            self._gathered.pop(connection).send(self._answered)
            flight = None
        if flight is None:
            flight = self._gathered[connection] = Flight(connection)
        flight.add(partition, batch, size)

    def flush(self) -> None:
        """Send what was gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, {}
            for flight in gathered.values():
                flight.send(self._answered)
