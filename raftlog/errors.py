"""Every error that raftlog raises.

What to do about an error is one of four things, by three class attributes of which at most one is True:

============= ============================================================ ===================================
attribute     means                                                        do
============= ============================================================ ===================================
``retriable`` the same call may succeed later, nothing has to be changed   call again; the client did so until
                                                                           its time was over
``abortable`` the transaction in which it happened cannot commit any more  abort it, do its work again in the
                                                                           next one
``fatal``     this handle will not work again                              close it, and open another if what
                                                                           the hint says allows it
none          the call was wrong, or what it asks for is not there         change the call
============= ============================================================ ===================================

Outside of a transaction an abortable error is about the records, or the positions, that it names. Two more
attributes tell more:

``indeterminate``
    the operation may or may not have taken effect (False: it certainly did not);
``hint``
    what to do about it, in a sentence.

All survive pickling (through Ray) and the wire: a broker answers with (class name, message, details) and
:func:`from_wire` makes the same class again.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RaftlogError(Exception):
    """Base of all errors of raftlog.

    Args:
        message: what happened, naming the thing.
        details: plain values (str, int, float, bool, None and lists or dicts of them) that go with it; they
            are readable as attributes.
    """

    retriable: ClassVar[bool] = False
    abortable: ClassVar[bool] = False
    fatal: ClassVar[bool] = False
    indeterminate: bool = False
    hint: ClassVar[str] = ""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        if "indeterminate" in details:
            self.indeterminate = bool(details["indeterminate"])

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details")
        if details is not None and name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[RaftlogError], message: str, details: dict[str, Any]) -> RaftlogError:
    return cls(message, **details)


def to_wire(error: RaftlogError) -> tuple[str, str, dict[str, Any]]:
    """(class name, message, details) for an error response."""
    return type(error).__name__, error.message, error.details


def from_wire(name: str, message: str, details: dict[str, Any]) -> RaftlogError:
    """The error that :func:`to_wire` described; a name this release does not know becomes RaftlogError."""
    cls = _all_subclasses().get(name)
    if cls is None:
        return RaftlogError(f"{name}: {message}", **details)
    return cls(message, **details)


def _all_subclasses() -> dict[str, type[RaftlogError]]:
    found: dict[str, type[RaftlogError]] = {}
    stack: list[type[RaftlogError]] = [RaftlogError]
    while stack:
        cls = stack.pop()
        found[cls.__name__] = cls
        stack.extend(cls.__subclasses__())
    return found


# -- what the caller passed ----------------------------------------------------------------------------------


class ConfigError(RaftlogError, ValueError):
    """An unknown or contradictory setting, or a value out of its range."""


class InvalidTopic(RaftlogError, ValueError):
    """A topic name that is not 1 to 249 of [a-zA-Z0-9._-], or is "." or ".."."""


class UnknownTopic(RaftlogError):
    """No topic of that name."""

    hint = "create it with log.create_topic(name), or look at log.topics()"


class UnknownPartition(RaftlogError):
    """The topic has no partition of that number."""


class TopicExists(RaftlogError):
    """A topic of that name is there already."""

    hint = "pass exist_ok=True to accept it"


class InvalidReplicationFactor(RaftlogError, ValueError):
    """The replication factor is above the number of brokers, or below 1."""


class InvalidRecord(RaftlogError, TypeError):
    """A key, value or header of a wrong type."""

    hint = "pass bytes, or give the producer a key_serializer / value_serializer"


class RecordTooLarge(RaftlogError, ValueError):
    """A record or batch above the limit; nothing of it was buffered."""


class SerializationError(RaftlogError, ValueError):
    """A serializer raised for this value."""


class DeserializationError(RaftlogError, ValueError):
    """A deserializer raised for a record; details: topic, partition, offset."""

    hint = "seek past it with consumer.seek(topic_partition, offset + 1)"


# -- bytes that do not check ---------------------------------------------------------------------------------


class CorruptFrame(RaftlogError, ValueError):
    """A log frame that is cut short, of an unknown version, or whose crc does not match."""


class CorruptBatch(RaftlogError, ValueError):
    """A record batch that does not check; nothing was appended."""


# -- cluster and connection ----------------------------------------------------------------------------------


class NotRunning(RaftlogError):
    """No cluster of that name answers."""

    hint = "start one with raftlog.start() or `raftlog start`"


class NoRay(NotRunning):
    """There is no Ray cluster to attach to."""

    hint = "start one with `ray start --head`, or set RAY_ADDRESS to one that runs"


class ClusterInUse(RaftlogError):
    """shutdown() found clients connected; details: clients."""

    hint = "close them, or pass force=True"


class IncompatibleVersion(RaftlogError):
    """Two sides speak no common version."""

    hint = "install the same raftlog release on both sides"


class NeedsUpgrade(RaftlogError):
    """The cluster runs at a feature level that does not have this yet. Details: level, needed."""

    hint = "when every broker runs the new release, run `raftlog upgrade`"


class AuthenticationFailed(RaftlogError):
    """The peer does not know the cluster's secret."""


class StaleIncarnation(RaftlogError):
    """A newer process of the same broker has taken over: this one must stop. Details: broker_id, incarnation,
    newest."""

    fatal = True
    hint = "nothing is to be done: its successor works"


class ProtocolError(RaftlogError):
    """The peer sent what the protocol does not allow; the connection is closed."""


class ConnectionLost(RaftlogError, ConnectionError):
    """The connection broke or could not be made."""

    retriable = True


class RequestTimeout(RaftlogError, TimeoutError):
    """No answer in time: the request may or may not have been carried out."""

    retriable = True
    indeterminate = True


class NotLeader(RaftlogError):
    """This replica does not lead the partition; nothing happened. Details: leader (broker id, None), term."""

    retriable = True


class LeadershipLost(RaftlogError):
    """The leader stepped down while the write was under way: it may or may not be committed."""

    retriable = True
    indeterminate = True


class UnknownReplica(RaftlogError):
    """The broker does not host that partition (any more, or not yet)."""

    retriable = True


class Busy(RaftlogError):
    """A limit on work in flight is reached; nothing happened."""

    retriable = True


class StaleController(RaftlogError):
    """A newer controller has taken over."""

    fatal = True
    hint = "nothing is to be done: its successor works"


# -- storage -------------------------------------------------------------------------------------------------


class StorageFull(RaftlogError, OSError):
    """No space left on the broker's device: writes are refused until there is room, reads go on."""

    retriable = True


class StorageFailed(RaftlogError, OSError):
    """A read, write or sync failed. After a failed sync the file is not trusted without a full check."""


class DataDirError(RaftlogError):
    """The data directory cannot be used; the message says which file and what to do."""

    fatal = True


class DataDirLocked(DataDirError):
    """Another live broker has the directory open."""


class ForeignDataDir(DataDirError):
    """The directory belongs to another cluster or broker."""


class DamagedData(DataDirError):
    """Bytes below the sync floor do not check: this is damage, not a torn tail, and is never truncated."""


class RecoveryRefused(DataDirError):
    """``raftlog recover`` is not due, or not safe with these directories."""

    hint = "nothing was changed"


# -- producing -----------------------------------------------------------------------------------------------


class DeliveryTimeout(RaftlogError, TimeoutError):
    """Not acknowledged within delivery_timeout_ms. ``indeterminate``: it may have been written."""

    abortable = True
    hint = "in a transaction: abort it and do its work again; without one, sending again may write it twice"


class DeliveryFailed(RaftlogError):
    """Deliveries failed that nobody had looked at; details: failures, one text each."""


class BufferFull(RaftlogError, TimeoutError):
    """No room in the producer's buffer within max_block_ms; the record was not buffered."""

    retriable = True


class OutOfOrderSequence(RaftlogError):
    """A producer's batch does not follow its last one: one in between is missing. Nothing was appended."""

    abortable = True
    hint = "in a transaction: abort it and do its work again; without one, send the record again"


class DuplicateSequence(RaftlogError):
    """The batch was written before, too long ago for its offset to be known."""

    abortable = True
    hint = "it is in the log"


class ProducerFenced(RaftlogError):
    """A newer producer with the same identity has taken over."""

    fatal = True
    hint = "somebody else has opened this transactional id: leave the work to it, or give each its own"


class UnknownProducer(RaftlogError):
    """The partition knows nothing of this producer id, yet the sequence is not 0 (its state expired)."""

    abortable = True
    hint = "in a transaction: abort it and do its work again; without one, sending again may write it twice"


# -- consuming -----------------------------------------------------------------------------------------------


class OffsetOutOfRange(RaftlogError):
    """No record at that offset: below the log's start or above its end. Details: start, end."""


class LogTruncated(RaftlogError):
    """The log no longer holds what the consumer read before its position: a power cut took records of a topic
    with flush=interval. Details: offset, up to which the log agrees with what was read."""

    hint = "go on with consumer.seek(topic_partition, error.offset)"


class ConcurrentUse(RaftlogError, RuntimeError):
    """A consumer was used from two threads at once."""


# -- transactions --------------------------------------------------------------------------------------------


class ConcurrentTransactions(RaftlogError):
    """The transaction before, of the same transactional id, is still being ended; nothing happened."""

    retriable = True


class InvalidTransaction(RaftlogError):
    """The transaction is not in a state in which this can be done: it has not begun, or has ended (in the
    other way, where its end was asked for). Nothing happened."""

    abortable = True
    hint = "abort it and begin the next one"


class TransactionAborted(RaftlogError):
    """The transaction was aborted; nothing of it will be read."""

    abortable = True
    hint = "abort it here too, begin the next one and do its work again"


class TransactionTimedOut(TransactionAborted, TimeoutError):
    """The transaction was open for longer than its timeout, and so was aborted."""

    hint = "begin the next one and do its work again; give it more time with transaction_timeout_ms"


class CommitInDoubt(RaftlogError, TimeoutError):
    """Nobody has answered whether the transaction was committed; it is, or will be aborted."""

    retriable = True
    indeterminate = True
    hint = "call txn.commit() again: it commits, or says that the transaction was aborted"


class UnknownTransactionalId(RaftlogError):
    """Nobody has this transactional id: it was never used, or not for so long that it expired."""

    fatal = True
    hint = "see which there are (`raftlog transactions list`); whoever had this one opens a new producer"


class StaleCoordinator(RaftlogError):
    """A later coordinator of the transaction has taken over. Details: epoch, its term."""

    fatal = True
    hint = "nothing is to be done: its successor works"


# -- groups --------------------------------------------------------------------------------------------------


class StaleMember(RaftlogError):
    """The group does not know this member, knows it at another epoch, or has given the partition to somebody
    else. Nothing happened. Details: member_epoch (where the member is now, -1: it is out of the group)."""

    abortable = True
    hint = "a member that is out joins again; work on partitions it lost is dropped, its successor repeats it"


class UnknownGroup(RaftlogError):
    """No group of that name."""


class GroupNotEmpty(RaftlogError):
    """The group has members, and what was asked for is for groups without. Details: members."""

    hint = "close its consumers first"


class UnstableOffsets(RaftlogError):
    """A transaction that is under way is about to commit offsets of these partitions: their position is
    known when it has ended."""

    retriable = True


class StaleOffsets(RaftlogError):
    """The group is not where these records were read from any more: somebody else has processed them, or has
    moved it. Nothing was written."""

    abortable = True
    hint = "read again from where the group is now, and do the work again"


# -- handles -------------------------------------------------------------------------------------------------


class Closed(RaftlogError, RuntimeError):
    """The handle was closed."""

    fatal = True
    hint = "open a new one"


class UseAfterFork(RaftlogError, RuntimeError):
    """The handle was made in the parent process."""

    fatal = True
    hint = "make a new one in the child process"


class NotPicklable(RaftlogError, TypeError):
    """The handle is tied to its process; pass the Log (it pickles) and make the handle where it is used."""
