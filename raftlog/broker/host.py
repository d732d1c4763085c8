"""What a replica sees of the broker it runs on."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from raftlog.broker.snapshots import SnapshotSlots
from raftlog.config import BrokerConfig
from raftlog.raft.config import RaftConfig
from raftlog.raft.types import Message, SoftState
from raftlog.storage.store import BrokerStore
from raftlog.telemetry.counters import Counters

if TYPE_CHECKING:
    from raftlog.broker.replica import Replica


class Host(Protocol):
    """What a replica needs of its broker."""

    @property
    def broker_id(self) -> int: ...

    @property
    def store(self) -> BrokerStore: ...

    @property
    def config(self) -> BrokerConfig: ...

    @property
    def feature_level(self) -> int:
        """Of the cluster: leaders propose no command that needs a higher one."""

    @property
    def snapshot_slots(self) -> SnapshotSlots: ...

    @property
    def counters(self) -> Counters: ...

    def raft_config(self, replica_id: int) -> RaftConfig: ...

    def now_ms(self) -> int: ...

    def wall_ms(self) -> int: ...

    def random_for(self, replica_id: int) -> Any: ...

    def mark(self, replica: Replica[Any]) -> None:
        """The replica has something to do: have it :meth:`hand_out`, :meth:`store` and :meth:`follow_up` at
        the end of this turn of the loop."""

    def send(self, broker_id: int, message: Message) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...

    def leadership_changed(self, replica: Replica[Any], before: SoftState | None) -> None: ...
