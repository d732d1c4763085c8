"""What is left of a cluster when a majority of a group is lost for good, and how it can go on. Pure.

::

    replica 1 (here)   ……… 118 119 120 | 121 122            ← most recent log: the group goes on from here
    replica 2 (lost)   ……… 118 119 120   121 122 123 124    ← acknowledged, perhaps; nobody can tell
    replica 3 (lost)   ……… 118 119 120   121 122 123

The group goes on with one more entry in that log: a configuration in which this replica alone votes, in a
term far above any that the lost ones can have reached (as etcd does it: ``--force-new-cluster``). The other
survivors are learners in it, keep what they have, and get their votes back as they catch up. Until they have
the new history's beginning they neither vote nor campaign (``history.lacks_beginning``): the configuration
that they know is the old one, and in that they may be a majority.

Of all logs that are here the most recent one holds whatever any of them knows to be committed: entries of its
last term came from the leader of that term, which had all that was committed before (Raft section 5.4.3). So
what the others have above it, Raft itself replaces.

Groups that keep a majority lose nothing. Where they have lost members they begin a new history all the same,
so that no lost broker belongs to anything any more: should its disk turn up, it is not let in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from raftlog.broker.history import HISTORY_TERMS, lacks_beginning
from raftlog.broker.internal_topics import METADATA_TOPIC
from raftlog.errors import DamagedData, RecoveryRefused
from raftlog.raft.confstack import ConfStack
from raftlog.raft.quorum import majority
from raftlog.raft.types import TERM_MAX, ConfState
from raftlog.record.frame import FrameKind
from raftlog.state.image import Partition
from raftlog.state.metadata import MetadataState
from raftlog.storage.offline import OfflineStore
from raftlog.storage.recovery import RecoveredReplica
from raftlog.storage.segment import batch_fields


class Fate(Enum):
    """What becomes of a group's records."""

    KEPT = "nothing is lost"
    CUT = "what was acknowledged beyond this is lost"
    LOST = "everything is lost"


@dataclass(frozen=True, slots=True)
class Copy:
    """A replica that is left.

    Args:
        broker_id: on which broker.
        replica_id: its id.
        term: of its last entry.
        index: of its last entry.
        committed: index up to which it knows entries to be committed.
        committed_offset: record offset behind these.
        end_offset: record offset behind its last entry.
        newest_term: the latest it knows of.
        amnesiac: it may lack the end of what it had written.
    """

    broker_id: int
    replica_id: int
    term: int
    index: int
    committed: int
    committed_offset: int
    end_offset: int
    newest_term: int
    amnesiac: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A group that some of its members are lost to.

    Args:
        topic: whose partition it replicates.
        topic_id: of the topic.
        partition: its number.
        fate: of its records.
        copies: what is left, the most recent log first; at most one on each broker.
        missing: ids of members that are not here, or cannot be used.
        conf: the configuration to go on with.
        term: of the new history.
    """

    topic: str
    topic_id: bytes
    partition: int
    fate: Fate
    copies: tuple[Copy, ...]
    missing: tuple[int, ...]
    conf: ConfState
    term: int

    @property
    def name(self) -> str:
        return self.topic if self.topic == METADATA_TOPIC else f"{self.topic}/{self.partition}"


@dataclass(frozen=True, slots=True)
class Loss:
    """The state of a cluster that has lost brokers.

    Args:
        survivors: brokers whose directories are here.
        lost: brokers of the cluster that are not.
        image: the metadata as the most recent log has them.
        metadata: the metadata group.
        groups: partitions that cannot go on as they are.
        unaffected: how many others there are.
        unusable: what is wrong with replicas that are here and cannot be used.
    """

    survivors: tuple[int, ...]
    lost: tuple[int, ...]
    image: MetadataState
    metadata: Group
    groups: tuple[Group, ...]
    unaffected: int
    unusable: tuple[str, ...]

    @property
    def is_due(self) -> bool:
        """Whether a group cannot go on by itself."""
        return any(group.fate is not Fate.KEPT for group in (self.metadata, *self.groups))


def metadata_source(stores: Mapping[int, OfflineStore]) -> int:
    """The broker whose metadata are the most recent.

    Raises:
        DamagedData: none of them can be used.
    """
    found = {
        broker_id: store.replicas[store.identity.metadata_replica]
        for broker_id, store in stores.items()
        if store.identity.metadata_replica in store.replicas
    }
    if not found:
        reasons = "; ".join(what for store in stores.values() for _, what in store.unusable.values())
        raise DamagedData(f"no directory has metadata that can be used: {reasons or 'they never ran'}")
    return max(found, key=lambda broker_id: _recency(found[broker_id]))


def assess(stores: Mapping[int, OfflineStore], image: MetadataState) -> Loss:
    """See what is left.

    Args:
        stores: broker id -> what its directory holds.
        image: all of the log of :func:`metadata_source`, applied.

    Raises:
        RecoveryRefused: a directory does not belong to the cluster, as the metadata have it.
    """
    for broker_id, store in stores.items():
        known = image.brokers.get(broker_id)
        if known is None or known.disk_id != store.identity.disk_id:
            raise RecoveryRefused(
                f"the most recent metadata know no broker {broker_id} with this directory: it was removed, "
                "or had just joined. Leave it out and move it away; an empty one joins anew"
            )
    members = {store.identity.metadata_replica: broker_id for broker_id, store in stores.items()}
    spec = next(
        store.replicas[store.identity.metadata_replica].spec
        for store in stores.values()
        if store.identity.metadata_replica in store.replicas
    )
    metadata = _group(spec.topic, spec.topic_id, spec.partition, members, stores, spec.conf)
    groups, unaffected = [], 0
    for topic in image.topics.values():
        for index, partition in enumerate(topic.partitions):
            founders = ConfState(voters=partition.founders)
            here = members_here(partition, stores)
            group = _group(topic.name, topic.topic_id, index, here, stores, founders)
            is_whole = all(broker_id in stores for _, broker_id in partition.members)
            if group.fate is not Fate.KEPT or group.missing or not is_whole:
                groups.append(group)
            else:
                unaffected += 1
    unusable = [
        f"replica {replica_id} of {spec.topic}/{spec.partition} on broker {broker_id}: {what}"
        for broker_id, store in stores.items()
        for replica_id, (spec, what) in store.unusable.items()
    ]
    lost = tuple(sorted(image.brokers.keys() - stores.keys()))
    return Loss(tuple(sorted(stores)), lost, image, metadata, tuple(groups), unaffected, tuple(unusable))


def members_here(partition: Partition, stores: Mapping[int, OfflineStore]) -> dict[int, int]:
    """Replica id -> broker id of a partition's members whose broker's directory is here."""
    return {member: broker_id for member, broker_id in partition.members if broker_id in stores}


def _group(
    topic: str,
    topic_id: bytes,
    partition: int,
    members: Mapping[int, int],
    stores: Mapping[int, OfflineStore],
    founders: ConfState,
) -> Group:
    """What is left of one group.

    Args:
        members: replica id -> broker id, of all that may be here.
        founders: the group's first configuration.
    """
    found = {
        replica_id: (broker_id, stores[broker_id].replicas[replica_id])
        for replica_id, broker_id in members.items()
        if replica_id in stores[broker_id].replicas
    }
    ranked = sorted(found, key=lambda each: (*(-part for part in _recency(found[each][1])), each))
    copies: dict[int, Copy] = {}
    for replica_id in ranked:
        broker_id, replica = found[replica_id]
        amnesiac = replica_id in stores[broker_id].amnesiac or lacks_beginning(replica.recovered)
        copies.setdefault(broker_id, _copy(broker_id, replica, amnesiac))
    if not copies:
        missing = tuple(sorted(founders.members))
        return Group(topic, topic_id, partition, Fate.LOST, (), missing, ConfState(), HISTORY_TERMS)
    best = found[ranked[0]][1].recovered
    confs = ConfStack(best.confs)
    certain = {copy.replica_id for copy in copies.values() if not copy.amnesiac}
    kept = all(
        len(certain.intersection(half)) >= majority(len(half))
        for conf in confs.possible(min(best.hard_state.commit, best.last_index))
        for half in (conf.voters, conf.outgoing)
        if half
    )
    # Nobody else has the new history's beginning: until they do, no other vote may count.
    best_id = ranked[0]
    usable = {copy.replica_id for copy in copies.values()}
    conf = ConfState((best_id,), tuple(sorted(usable - {best_id})))
    missing = tuple(sorted(confs.current.members - usable))
    term = _next_history(copies.values())
    fate = Fate.KEPT if kept else Fate.CUT
    return Group(topic, topic_id, partition, fate, tuple(copies.values()), missing, conf, term)


def _next_history(copies: Iterable[Copy]) -> int:
    newest = max(copy.newest_term for copy in copies)
    term = (newest // HISTORY_TERMS + 1) * HISTORY_TERMS
    if term + HISTORY_TERMS > TERM_MAX:
        raise RecoveryRefused(f"a group has reached term {newest}: there is no room for another history")
    return term


def _recency(replica: RecoveredReplica) -> tuple[int, int]:
    """(term, index) of the last entry: what Raft goes by (section 5.4.1)."""
    recovered = replica.recovered
    return recovered.terms[-1][1] if recovered.terms else recovered.prev_term, recovered.last_index


def _copy(broker_id: int, replica: RecoveredReplica, amnesiac: bool) -> Copy:
    recovered = replica.recovered
    term, index = _recency(replica)
    committed = min(recovered.hard_state.commit, index)
    end = committed_offset = replica.flushed.offset
    for entry in recovered.tail:
        if entry.kind == FrameKind.BATCH:
            end = batch_fields(entry.frame)[0]
            committed_offset = end if entry.index <= committed else committed_offset
    return Copy(
        broker_id,
        replica.spec.replica_id,
        term,
        index,
        committed,
        committed_offset,
        end,
        max(term, recovered.hard_state.term),
        amnesiac,
    )
