"""The topics in which brokers keep state of their own: consumer groups and transactions.

A group or a transactional id belongs to the partition that its name hashes to, and the leader of that
partition is its coordinator. So these topics are made once, on first use, and keep their number of
partitions. Nobody else may make, delete, write or read them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from raftlog.config import BrokerConfig
from raftlog.errors import Busy, InvalidTopic, RaftlogError
from raftlog.record.partitioner import murmur2
from raftlog.state.image import Topic
from raftlog.state.metadata import MetadataState
from raftlog.state.metadata_commands import Command, CreateTopic

METADATA_TOPIC: Final = "__metadata"
GROUPS_TOPIC: Final = "__groups"
TRANSACTIONS_TOPIC: Final = "__transactions"
COORDINATED: Final = (GROUPS_TOPIC, TRANSACTIONS_TOPIC)
"""Those that are made on first use."""
REPLICATION_MAX: Final = 3
_WAIT_S: Final = 5.0
_RETRY_S: Final = 0.03


def partition_of(name: str, partitions: int) -> int:
    """The partition of ``__groups`` that a group of that name belongs to, or of ``__transactions`` for a
    transactional id: Kafka's rule for records with that key."""
    return (murmur2(name.encode()) & 0x7FFFFFFF) % partitions


def check_reserved(name: str, internal: bool) -> None:
    """Raise InvalidTopic where a user names a topic that is the brokers' own, or a broker one that is not."""
    if internal and name not in COORDINATED:
        raise InvalidTopic(f"there is no internal topic {name!r} to be made")
    if not internal and name in (METADATA_TOPIC, *COORDINATED):
        raise InvalidTopic(f"topic {name!r} is internal: brokers alone make, write and delete it")


class MetadataCaller(Protocol):
    """What is needed of the metadata service."""

    @property
    def image(self) -> MetadataState:
        """The applied metadata."""

    async def call(self, command: Command) -> object:
        """Have a command applied."""

    def place(self, staged: MetadataState, partitions: int, replication_factor: int) -> list[list[int]]:
        """Brokers for each partition of a new topic."""


class InternalTopics:
    """Makes internal topics when they are needed.

    Args:
        metadata: this broker's way to the metadata group.
        config: how many partitions they get, and how large their segments are.
        random_bytes: for topic ids.
    """

    def __init__(self, metadata: MetadataCaller, config: BrokerConfig, random_bytes: _RandomBytes) -> None:
        self._metadata = metadata
        self._config = config
        self._random_bytes = random_bytes
        self._making = asyncio.Lock()

    async def ensure(self, names: Sequence[str]) -> None:
        """Return once this broker knows all these topics (of ``COORDINATED``). Whoever comes first makes
        them; the others find them made.

        Raises:
            Busy: they could not be made in time; ask again.
        """
        error: RaftlogError | None = None
        try:
            async with asyncio.timeout(_WAIT_S), self._making:
                while missing := [name for name in names if name not in self._metadata.image.topics]:
                    error = await self._create(missing[0])
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise Busy(f"{', '.join(names)} cannot be made now: {error or 'no answer'}") from None

    async def _create(self, name: str) -> RaftlogError | None:
        """Try to; returns what came in between."""
        image, config = self._metadata.image, self._config
        # Brokers that are away now catch up later. While most of them are, nothing can be created anyway; and
        # what is created while a broker happens to be down must not lack a replica for ever.
        replication = min(REPLICATION_MAX, len(image.brokers))
        try:
            await self._metadata.call(
                CreateTopic(
                    name=name,
                    topic_id=self._random_bytes(16),
                    config={"segment_bytes": config.internal_segment_bytes},
                    internal=True,
                    assignment=self._metadata.place(image, config.internal_partitions, replication),
                )
            )
        except RaftlogError as error:
            return error  # TopicExists, too: then it is on its way here
        return None


class _RandomBytes(Protocol):
    def __call__(self, count: int) -> bytes: ...


def internal_topic(image: MetadataState, name: str) -> Topic | None:
    """The internal topic of that name, if it was made already."""
    found = image.topics.get(name)
    return found if found is not None and found.internal else None
