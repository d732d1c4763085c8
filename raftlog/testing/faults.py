"""The nemesis: breaks a simulated cluster, and never more of it than the log promises to survive.

Each fault has a number and a Random of its own, drawn from the seed and that number, so that a failing run
can be repeated without some of its faults.

What may be broken at once: brokers that are *down* or *cut off* come back and cost nothing but time; brokers
whose data is *lost* (a wiped directory, a journal that recovery refuses) count against the minority until
another broker has taken their place. So does, with flush=interval, one whose power was cut, until it has
caught up. What can be repaired may be damaged anywhere, as long as one good copy of every entry is left
(:mod:`raftlog.testing.atlas`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from raftlog.broker.coordinator_replica import CoordinatorReplica
from raftlog.broker.internal_topics import REPLICATION_MAX
from raftlog.broker.partition import PartitionReplica
from raftlog.errors import (
    DamagedData,
    DataDirError,
    ForeignDataDir,
    NotLeader,
    RaftlogError,
    StorageFailed,
    StorageFull,
)
from raftlog.raft.types import Role
from raftlog.testing.disk import CrashMode
from raftlog.testing.disk_faults import DiskFaults
from raftlog.testing.loop import NoProgress
from raftlog.testing.moves import RIVAL, Mover
from raftlog.testing.sim_cluster import SimCluster, broker_name
from raftlog.testing.swarm import Profile

CATCH_SECONDS: Final = 0.3
"""How long a power cut waits for bytes that are written and not synced, to hit them."""
USURP_SECONDS: Final = 4.0
"""How long another leader may take to be elected."""
FALL_BEHIND_SECONDS: Final = 12.0
"""How long retention may take to drop what a broker that is away has not got."""
MOVE_SECONDS: Final = 1.0
"""How long it may take until a replica moves, for the controller to be killed then."""
GROWTH_MAX: Final = 2
"""How many brokers may join beyond those that there are at first."""
HEAL_ROUNDS_MAX: Final = 5
_ONE_AWAY: Final = (
    "kill",
    "kill coordinator",
    "crash twice",
    "power cut",
    "isolate",
    "one way",
    "deafen",
    "usurp",
    "fall behind",
)
"""Faults that take one broker away."""


class Nemesis:
    """Faults for one run.

    Args:
        cluster: to break.
        profile: which faults.
        crash_client: ends a random client's process; for the fault "client crash".
        a_client: the node of a random client; for "client pause" and "client cut".
        committing: nodes of clients that wait for the answer to a commit; for "client cut".
    """

    def __init__(
        self,
        cluster: SimCluster,
        profile: Profile,
        crash_client: Callable[[], None],
        a_client: Callable[[], str],
        committing: Callable[[], list[str]],
    ) -> None:
        self.cluster = cluster
        self.profile = profile
        self.fired: Counter[str] = Counter()
        self.log: list[str] = []
        """What was done, for people."""
        self.down: set[int] = set()
        self.cut: set[int] = set()
        self.lost: set[int] = set()
        self.mover = Mover(cluster, profile.policy, self.lost)
        self.suspect: set[int] = set()
        """Bits of their disk have changed: they run, and are not trusted."""
        self._forgot: set[int] = set()
        self._crash_client = crash_client
        self._a_client = a_client
        self._committing = committing
        self.random = random.Random(0)
        """Of the fault under way."""
        self._disks = DiskFaults(self)
        self._faults: dict[str, Callable[[int], None]] = {
            "kill": self._kill,
            "crash twice": self._crash_twice,
            "power cut": self._power_cut,
            "isolate": self._isolate,
            "one way": self._one_way,
            "deafen": self._deafen,
            "usurp": self._usurp,
            "slow receiver": self._slow_receiver,
            "pause": self._pause,
            "clock": self._clock,
            "kill coordinator": self._kill,
            "transfer": self._transfer,
            "move": self._move,
            "drain": self._drain,
            "fall behind": self._fall_behind,
        }

    @property
    def minority(self) -> int:
        """Brokers that may be out of reach at once while the cluster goes on."""
        return (self.profile.brokers - 1) // 2

    @property
    def spare(self) -> int:
        """How many more may be taken away now."""
        return self.minority - len(self.down | self.cut | self.lost)

    @property
    def spare_copies(self) -> int:
        """How many more disks may be lost for good, or forget what was acknowledged."""
        copies = self.profile.replication
        if self.profile.pipeline is not None:  # its coordinators have no more than so many
            copies = min(copies, REPLICATION_MAX)
        return (copies - 1) // 2 - len(self.lost | self.suspect | self._forgetful())

    @property
    def sound(self) -> set[int]:
        """Brokers that have all that they ever acknowledged."""
        return set(self._whole) - self.suspect - self._forgetful()

    def _forgetful(self) -> set[int]:
        """Brokers that lost power, or failed a sync, under a topic that is synced now and then, and have not
        caught up since."""
        for broker_id in sorted(self._forgot & self.cluster.brokers.keys()):
            store = self.cluster.brokers[broker_id].store
            has_failed = store.fault is not None or self.cluster.disks[broker_id].fails_soon
            is_well = not store.ward.sleepers and not any(log.amnesiac for log in store.logs.values())
            if is_well and not has_failed:
                self._forgot.discard(broker_id)
        return self._forgot

    def may_cut_power(self, brokers: int) -> bool:
        """With flush=interval no more than a minority may forget at once."""
        return not self.profile.may_forget or self.spare_copies >= brokers

    # -- choosing --------------------------------------------------------------------------------------------

    def step(self, number: int) -> None:
        """Let some time pass, then do fault ``number`` (unless the profile skips it)."""
        rng = self.random = random.Random(f"fault {self.profile.seed}/{number}")
        self.cluster.loop.run_for(rng.uniform(*self.profile.gap_seconds))
        self.revive()
        if number in self.profile.skip:
            return
        possible = self._possible()
        if not possible:
            return
        name = rng.choices(list(possible), [self._weight(each) for each in possible])[0]
        self.fired[name] += 1
        self.say(f"fault {number}: {name}")
        possible[name]()

    def _weight(self, name: str) -> float:
        return 3.0 if name == "recover" else self.profile.weights[name]

    def _possible(self) -> dict[str, Callable[[], None]]:
        wanted = self.profile.weights
        up = [broker for broker in sorted(self.cluster.brokers) if broker not in self.cut]
        found: dict[str, Callable[[], None]] = {
            "client crash": self._crash_client,
            "client pause": self._pause_client,
            "client cut": self._cut_client,
            "kill controller": self._kill_controller,
            "two controllers": lambda: self.mover.govern(RIVAL),
        }
        if len(self.cluster.disks) < self.profile.brokers + GROWTH_MAX:
            found["grow"] = self._join
        if self.profile.brokers > 1:
            found |= {"break": self._break, "clog": self._clog, "slow link": self._slow_link}
        if not self.down and not self.cut and self.may_cut_power(len(self.cluster.brokers)):
            found["blackout"] = self._blackout
        if self.spare > 0:
            found["split"] = self._split
        for name, fault in (self._faults | self._disks.faults).items():
            victims = [broker for broker in up if self._disks.may(name, broker)]
            if name in _ONE_AWAY and self.spare <= 0:
                continue
            if name in ("power cut", "crash twice") and not self.may_cut_power(1):
                continue
            if name == "fall behind" and not self.profile.retains:
                continue
            if name == "move" and (self.profile.replication >= len(self._whole) or not self.mover.topics):
                continue
            if name in ("usurp", "deafen"):
                victims = [broker for broker in up if self._leads(broker)]
            if name == "kill coordinator":
                victims = [broker for broker in up if self._coordinates(broker)]
            if victims:
                victim = self.random.choice(victims)
                found[name] = lambda fault=fault, victim=victim: fault(victim)  # type: ignore[misc]
        found = {name: fault for name, fault in found.items() if name in wanted}
        if self.down or self.cut or self._missing:
            found["recover"] = self.recover
        return found

    def say(self, what: str) -> None:
        self.log.append(f"{self.cluster.loop.time() - 1000:.3f} s  {what}")
        self.cluster.watch.note(what)

    # -- starting and stopping -------------------------------------------------------------------------------

    def revive(self) -> None:
        """Start anew the controller and the brokers that ended by themselves, as whoever hosts them does."""
        self.mover.govern()
        for broker_id, broker in list(self.cluster.brokers.items()):
            if broker.failed.done():
                self.say(f"broker {broker_id} ended: {broker.failed.result()}")
                self.cluster.kill_broker(broker_id)
                if not isinstance(broker.failed.result(), ForeignDataDir):
                    self.start(broker_id)
        for broker_id in self.mover.forgotten():
            if broker_id in self.cluster.brokers:
                self.cluster.kill_broker(broker_id)  # it had not heard of it
            self.fired["forgotten"] += 1
            self.say(f"broker {broker_id} is forgotten")
            self.lost.discard(broker_id)
            self.suspect.discard(broker_id)
            self._forgot.discard(broker_id)
            self.down.discard(broker_id)
            self.cut.discard(broker_id)
            del self.cluster.disks[broker_id]

    @property
    def needs_a_hand(self) -> bool:
        """Whether :meth:`revive` has something to do."""
        ended = any(broker.failed.done() for broker in self.cluster.brokers.values())
        return ended or not self.mover.is_governed or bool(self.mover.forgotten())

    def start(self, broker_id: int) -> None:
        """Start a broker. One whose data recovery refuses is lost, if a fault explains it."""
        self.down.discard(broker_id)
        for _ in range(3):
            try:
                self.cluster.start_broker(broker_id)
            except DataDirError as error:
                if not isinstance(error, DamagedData):
                    raise
                self.say(f"broker {broker_id} refuses to start: {error}")
                self.fired["refused to start"] += 1
                if broker_id in self.suspect:
                    self.lose(broker_id)
                elif broker_id in self._disks.atlas.spoilt:
                    self.down.add(broker_id)  # its metadata are damaged: it needs others to start
                else:
                    raise
                return
            except (StorageFull, StorageFailed) as error:
                self.say(f"broker {broker_id} cannot start: {error}")
                self.cluster.disks[broker_id].capacity = None
            else:
                return
        raise AssertionError(f"broker {broker_id} does not start")

    def lose(self, broker_id: int) -> None:
        """Its data is gone for good."""
        self.lost.add(broker_id)
        self.cluster.watch.distrust(broker_id)

    def recover(self) -> None:
        """Start what is down, connect what is cut off, put new brokers in the place of lost ones."""
        for broker_id in sorted(self.down):
            self.start(broker_id)
        for broker_id in sorted(self.cut):
            self.cut.discard(broker_id)
            self.cluster.network.heal(broker_name(broker_id))
        for _ in range(self._missing):
            self._join()

    @property
    def _missing(self) -> int:
        """How many brokers there are too few of."""
        return max(0, self.profile.brokers - len(self._whole))

    def _join(self) -> None:
        """An empty disk becomes a broker, if the cluster can be asked."""
        new = self.mover.join_broker()
        if new is None:
            self.say("nobody can join now")
        else:
            self.fired["joined"] += 1
            self.say(f"broker {new} has joined")

    def heal(self) -> None:
        """End every fault that can end."""
        self.revive()
        for disk in self.cluster.disks.values():
            disk.capacity = None
            disk.fail_sync(0)
        self.cluster.network.heal()
        self._restore_latency()
        for _ in range(HEAL_ROUNDS_MAX):
            self.recover()
            if not self.down and not self._missing:
                return
        raise NoProgress(f"brokers {sorted(self.down)} do not start, {sorted(self.lost)} are not replaced")

    def _restore_latency(self) -> None:
        names = [broker_name(broker_id) for broker_id in self.cluster.disks]
        for a in names:
            self.cluster.network.read_slowly(a, None)
            for b in names:
                if a != b:
                    self.cluster.network.set_latency(a, b, *self.profile.latency)

    def heal_quorum(self) -> None:
        """Heal a random quorum of brokers among themselves; the others stay away or cannot be heard. Those
        that have damage to be repaired or have forgotten something may need one of the others."""
        rng = random.Random(f"quorum {self.profile.seed}")
        chosen: set[int] = set()
        self.revive()
        self.cluster.network.heal()
        self._restore_latency()
        for broker_id in rng.sample(self._whole, len(self._whole)):
            # No time passes from here to the end of the others: who joins meanwhile changes the quorum.
            if self.mover.is_quorum(chosen - self._forgetful() - self._disks.atlas.spoilt):
                break
            chosen.add(broker_id)
            self.cluster.disks[broker_id].capacity = None
            self.cluster.disks[broker_id].fail_sync(0)
            self.cut.discard(broker_id)
            if broker_id in self.down:
                self.start(broker_id)
        for broker_id in sorted(set(self.cluster.brokers) - chosen):
            rng.choice([self._end, self._isolate, self._deafen])(broker_id)
        self.say(f"only brokers {sorted(chosen)} are healed")

    # -- network ---------------------------------------------------------------------------------------------

    def _pair(self) -> tuple[str, str]:
        a, b = self.random.sample(sorted(self.cluster.disks), 2)
        return broker_name(a), broker_name(b)

    def _break(self) -> None:
        self.cluster.network.break_connections(*self._pair())

    def _clog(self) -> None:
        self.cluster.network.clog(*self._pair(), self.random.uniform(0.1, 3.0))

    def _slow_link(self) -> None:
        least = self.random.uniform(0.01, 0.2)
        self.cluster.network.set_latency(*self._pair(), least, least * self.random.uniform(1.0, 3.0))

    def _slow_receiver(self, broker_id: int) -> None:
        """Its connections fill up, and those who send to it must bear that."""
        name, network = broker_name(broker_id), self.cluster.network
        network.read_slowly(name, self.random.choice([5e3, 50e3, 500e3]))
        self.cluster.loop.call_later(self.random.uniform(0.5, 5.0), network.read_slowly, name, None)

    def _isolate(self, broker_id: int) -> None:
        self._cut_off(broker_id, both=True)

    def _one_way(self, broker_id: int) -> None:
        self._cut_off(broker_id, both=False)

    def _cut_off(self, broker_id: int, *, both: bool) -> None:
        self.cut.add(broker_id)
        for other in sorted(self.cluster.disks):
            if other != broker_id:
                self.cluster.network.cut(broker_name(broker_id), broker_name(other), both=both)

    def _deafen(self, broker_id: int) -> None:
        """It is heard and hears nothing."""
        self.cut.add(broker_id)
        for other in sorted(self.cluster.disks):
            if other != broker_id:
                self.cluster.network.cut(broker_name(other), broker_name(broker_id), both=False)

    def _split(self) -> None:
        """Two halves; clients reach both."""
        brokers = sorted(set(self.cluster.disks) - self.lost - self.down - self.cut)
        few = self.random.sample(brokers, min(self.spare, len(brokers)))
        many = [broker_id for broker_id in self.cluster.disks if broker_id not in few]
        self.cut |= set(few)
        self.cluster.network.partition(
            [broker_name(broker_id) for broker_id in few], [broker_name(broker_id) for broker_id in many]
        )

    # -- processes -------------------------------------------------------------------------------------------

    def _kill(self, broker_id: int) -> None:
        self._catch_unsynced([broker_id])
        if broker_id in self.cluster.brokers:
            self._end(broker_id)

    def _end(self, broker_id: int) -> None:
        self.down.add(broker_id)
        self.cluster.kill_broker(broker_id)

    def _crash_twice(self, broker_id: int) -> None:
        """A kill, which leaves writes that no sync has covered, and a power cut soon after the restart."""
        self._kill(broker_id)
        self.start(broker_id)
        self.cluster.loop.run_for(self.random.uniform(0.01, 1.0))
        if broker_id in self.cluster.brokers:
            self._cut_power(broker_id, self._mode())

    def may_have_forgotten(self, broker_id: int) -> None:
        """What a broker wrote and did not sync may be gone."""
        if self.profile.may_forget:
            self._forgot.add(broker_id)

    def _cut_power(self, broker_id: int, mode: CrashMode) -> None:
        self.down.add(broker_id)
        self.may_have_forgotten(broker_id)
        self.cluster.cut_power(broker_id, mode)

    def _catch_unsynced(self, brokers: list[int]) -> None:
        """Run on until one of these disks is in the middle of a write, if that comes soon."""
        disks = [self.cluster.disks[broker_id] for broker_id in brokers]
        loop = self.cluster.loop
        until = loop.time() + CATCH_SECONDS
        if self.random.random() < 0.3:
            for disk in disks:
                loop.call_soon(disk.stall, CATCH_SECONDS)  # whoever does not wait for it is found out
            loop.run_for(CATCH_SECONDS * self.random.random())
        loop.run_until(
            lambda: loop.time() >= until or any(disk.unsynced_bytes for disk in disks), 10 * CATCH_SECONDS
        )

    def _mode(self) -> CrashMode:
        return self.random.choice([CrashMode.RANDOM, CrashMode.NONE, CrashMode.PREFIX, CrashMode.ALL])

    def _power_cut(self, broker_id: int) -> None:
        self._catch_unsynced([broker_id])
        self._cut_power(broker_id, self._mode())

    def _blackout(self) -> None:
        """All brokers lose power at once: only what was synced is left."""
        brokers = sorted(self.cluster.brokers)
        self._catch_unsynced(brokers)
        mode = self._mode()
        for broker_id in brokers:
            self._cut_power(broker_id, mode)
        self.cluster.loop.run_for(0.1)
        for broker_id in self.random.sample(brokers, len(brokers)):
            self.start(broker_id)

    def _pause(self, broker_id: int) -> None:
        loop, name = self.cluster.loop, broker_name(broker_id)
        loop.pause(name)
        loop.run_for(self.random.uniform(0.1, 4.0))
        loop.resume(name)

    def _pause_client(self) -> None:
        """A client stands still while the others go on: it comes back as a zombie."""
        loop, name = self.cluster.loop, self._a_client()
        loop.pause(name)
        loop.call_later(self.random.choice([0.5, 2.0, 6.0]), loop.resume, name)

    def _cut_client(self) -> None:
        """A client is heard by nobody, or hears nobody, for a while; if that comes soon, while it commits."""
        rng, loop, network = self.random, self.cluster.loop, self.cluster.network
        until = loop.time() + CATCH_SECONDS
        loop.run_until(lambda: loop.time() >= until or bool(self._committing()), 10 * CATCH_SECONDS)
        loop.run_for(rng.choice([0.0, self.profile.latency[1]]))
        name, both = rng.choice(self._committing() or [self._a_client()]), rng.random() < 0.5
        for broker_id in sorted(self.cluster.disks):
            network.cut(broker_name(broker_id), name, both=both)
        loop.call_later(rng.choice([0.5, 2.0, 6.0]), network.heal, name)

    def _clock(self, broker_id: int) -> None:
        jump = self.random.choice([-1, 1]) * self.random.choice([50, 5_000, 3_600_000])
        drift = self.random.uniform(-0.2, 0.2)
        self.cluster.loop.adjust_clock(broker_name(broker_id), jump_ms=jump, drift=drift)

    def _transfer(self, broker_id: int) -> None:
        """Hand over the leadership of everything that the broker leads."""
        loop = self.cluster.loop
        broker = self.cluster.brokers[broker_id]
        for replica in list(broker.replicas()):
            node = replica.node
            if node.role is Role.LEADER and replica.fault is None and node.progress:
                to = self.random.choice(sorted(node.progress))
                with loop.node(broker_name(broker_id)):
                    try:
                        node.transfer_leadership(to, broker.now_ms())
                    except (NotLeader, RaftlogError):
                        continue
                    broker.mark(replica)

    @property
    def _whole(self) -> list[int]:
        """Brokers that are not lost for good."""
        return [broker_id for broker_id in sorted(self.cluster.disks) if broker_id not in self.lost]

    def _move(self, broker_id: int) -> None:
        """A partition's replicas shall be on other brokers, reachable or not."""
        self.say(self.mover.move(self.random, self._whole, broker_id))

    def _drain(self, broker_id: int) -> None:
        """A broker is to go, or those that were to go are to stay."""
        self.mover.drain(self.mover.drained or [broker_id], not self.mover.drained)

    def _kill_controller(self) -> None:
        """If that comes soon, in the middle of a move."""
        loop = self.cluster.loop
        until = loop.time() + MOVE_SECONDS
        loop.run_until(lambda: loop.time() >= until or self.mover.is_moving, 10 * MOVE_SECONDS)
        loop.run_for(self.random.uniform(0.0, 0.5))
        self.mover.kill_controllers()

    def _fall_behind(self, broker_id: int) -> None:
        """A broker is away until others have dropped entries that it has not got, if that comes soon."""
        ends = {_place(replica): replica.log.last_index for replica in self._partitions(broker_id)}
        self.random.choice([self._kill, self._isolate])(broker_id)
        loop = self.cluster.loop
        until = loop.time() + FALL_BEHIND_SECONDS

        def is_behind() -> bool:
            return loop.time() >= until or any(
                replica.log.first_index > ends.get(_place(replica), 1 << 62)
                for other in self.cluster.brokers
                if other != broker_id
                for replica in self._partitions(other)
            )

        loop.run_until(is_behind, 10 * FALL_BEHIND_SECONDS)

    # -- disks -----------------------------------------------------------------------------------------------

    def _leads(self, broker_id: int) -> bool:
        """Whether the broker leads a partition and serves it."""
        return any(replica.staged is not None for replica in self._partitions(broker_id))

    def _coordinates(self, broker_id: int) -> bool:
        """Whether the broker coordinates groups or transactions."""
        return any(
            isinstance(replica, CoordinatorReplica) and replica.staged is not None
            for replica in self.cluster.brokers[broker_id].replicas()
        )

    def _partitions(self, broker_id: int) -> list[PartitionReplica]:
        replicas = self.cluster.brokers[broker_id].replicas()
        return [replica for replica in replicas if isinstance(replica, PartitionReplica)]

    def _usurp(self, broker_id: int) -> None:
        """A leader whose disk stands still is heard no more: it takes writes that nobody else gets, and the
        next leader cuts them off while they are still on their way to the disk."""
        rng, loop = self.random, self.cluster.loop
        ending = rng.choice(["leave", "transfer", "pause"])
        if ending != "pause":  # else it shall be able to campaign at once
            loop.call_soon(self.cluster.disks[broker_id].stall, rng.uniform(0.5, 6.0))
        self._cut_off(broker_id, both=ending == "pause" or rng.random() < 0.5)
        if ending == "leave":
            loop.run_for(rng.uniform(0.5, 3.0))
            return
        until = loop.time() + USURP_SECONDS
        others = [other for other in self.cluster.brokers if other != broker_id]
        loop.run_until(lambda: loop.time() >= until or any(map(self._leads, others)), 10 * USURP_SECONDS)
        loop.run_for(rng.choice([0.0, 0.01, 0.3]))
        self._return(broker_id, pause=ending == "pause")

    def _return(self, broker_id: int, *, pause: bool) -> None:
        """The usurped leader is back when the next one has just gone: to another, or to sleep."""
        rng, loop = self.random, self.cluster.loop
        usurpers = [other for other in sorted(self.cluster.brokers) if self._leads(other)]
        usurpers = [other for other in usurpers if other != broker_id]
        for other in usurpers:
            if pause:
                loop.pause(broker_name(other))
            else:
                self._transfer(other)
        if not pause:
            loop.run_for(rng.uniform(0.1, 1.0))
        self.cut.discard(broker_id)
        self.cluster.network.heal(broker_name(broker_id))
        if pause:
            loop.run_for(rng.uniform(0.5, 4.0))
            for other in usurpers:
                loop.resume(broker_name(other))


def _place(replica: PartitionReplica) -> tuple[bytes, int]:
    return replica.log.spec.topic_id, replica.log.spec.partition
