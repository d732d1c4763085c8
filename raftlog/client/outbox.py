"""What the sender has for a broker in one turn of the loop goes in one request, for all partitions that this
broker leads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

from raftlog.client.accumulator import ProducerBatch
from raftlog.errors import ProtocolError, RaftlogError
from raftlog.net.connection import RpcConnection
from raftlog.net.frames import Buffer
from raftlog.net.rpc import ProducePartition, ProduceRequest, ProduceResponse

REQUEST_BYTES_MAX: Final = 1024 * 1024
"""Batches beyond it go into another request: a broker takes a request when all of it has come."""

Answered: TypeAlias = (
    "Callable[[Flight, ProduceResponse | None, memoryview | None, RaftlogError | None], None]"
)


class Flight:
    """A request: gathered, then under way until each of its batches is answered.

    Attributes:
        connection: where it goes.
        size: bytes of its batches, as their producer accounts for them.
    """

    __slots__ = ("_attempts", "_batches", "_partitions", "_pieces", "connection", "size")

    def __init__(self, connection: RpcConnection) -> None:
        self.connection = connection
        self.size = 0
        self._attempts: list[int] = []
        """By number: which one of the batch this is."""
        self._partitions: list[ProducePartition] = []
        self._pieces: list[tuple[Buffer, ...]] = []
        self._batches: dict[int, ProducerBatch] = {}
        """By number; those that are not answered."""

    def add(self, partition: ProducePartition, batch: ProducerBatch) -> None:
        """One more batch."""
        attempts = self._attempts
        self._batches[len(attempts)] = batch
        attempts.append(batch.attempt)
        self._partitions.append(partition)
        self._pieces.append(batch.encoded)
        self.size += batch.bytes

    def send(self, answered: Answered | None) -> None:
        """Let it go; what it carried is not kept."""
        pieces, self._pieces = self._pieces, []
        lengths: list[int] = []
        payload: Sequence[Buffer] = pieces[0]
        if len(pieces) > 1:
            lengths = [sum(map(len, each)) for each in pieces[:-1]]
            payload = [piece for each in pieces for piece in each]
        if answered is not None:
            self.connection.ask(ProduceRequest(self._partitions, lengths), payload, partial(answered, self))
        elif not self.connection.closed:
            self.connection.send(ProduceRequest(self._partitions, lengths, 0), payload)

    def take(self, response: ProduceResponse) -> list[tuple[int, ProducerBatch]]:
        """The batches that a response answers, in its order, with their numbers.

        Raises:
            ProtocolError: it does not fit the request, or what was answered before.
        """
        batches, numbers = self._batches, response.numbers
        if numbers and (len(set(numbers)) != len(numbers) or not batches.keys() >= set(numbers)):
            raise ProtocolError(f"an answer to batches {numbers}, of which {list(batches)} are under way")
        if len(response.batches) != len(numbers or batches):
            raise ProtocolError(f"{len(response.batches)} answers to {len(numbers or batches)} batches")
        if numbers:
            return [(number, batches.pop(number)) for number in numbers]
        return self.take_rest()

    def take_rest(self) -> list[tuple[int, ProducerBatch]]:
        """The batches that are not answered."""
        batches, self._batches = self._batches, {}
        return list(batches.items())

    def is_news(self, number: int, batch: ProducerBatch) -> bool:
        """Whether an answer to that batch is: not if it was given up, or sent again, meanwhile."""
        return not batch.done and batch.attempt == self._attempts[number]


class Outbox:
    """The requests that are being gathered.

    Args:
        answered: told the answer to each, in parts if it comes so; as of ``RpcConnection.ask``. None: there
            are no answers (acks=0).

    Attributes:
        gathered: what the next :meth:`flush` has to send.
    """

    __slots__ = ("_answered", "gathered")

    def __init__(self, answered: Answered | None) -> None:
        self._answered = answered
        self.gathered: dict[RpcConnection, Flight] = {}

    def add(self, connection: RpcConnection, partition: ProducePartition, batch: ProducerBatch) -> None:
        """Put a batch into the request for that broker, which leaves with the next :meth:`flush`, or now if
        it is large."""
        flight = self.gathered.get(connection)
        if flight is not None and flight.size + batch.bytes > REQUEST_BYTES_MAX:
            self.gathered.pop(connection).send(self._answered)
            flight = None
        if flight is None:
            flight = self.gathered[connection] = Flight(connection)
        flight.add(partition, batch)

    def flush(self) -> None:
        """Send what was gathered."""
        gathered, self.gathered = self.gathered, {}
        for flight in gathered.values():
            flight.send(self._answered)
