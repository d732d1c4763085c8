"""The nemesis: breaks a simulated cluster, and never more of it than the log promises to survive.

Each fault has a number and a Random of its own, drawn from the seed and that number, so that a failing run
can be repeated without some of its faults.

What may be broken at once: brokers that are *down* or *cut off* come back and cost nothing but time; brokers
whose data is *lost* (a wiped directory, rot that recovery refuses, a sync that failed, after which nothing
that the disk says is to be trusted) count against the minority for good. So at least one good copy of every
committed entry stays.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from raftlog.broker.partition import PartitionReplica
from raftlog.broker.replica import Replica
from raftlog.errors import (
    CorruptFrame,
    DamagedData,
    DataDirError,
    NotLeader,
    RaftlogError,
    StorageFailed,
    StorageFull,
)
from raftlog.raft.types import Role
from raftlog.storage.journal_format import FILE_HEADER_BYTES
from raftlog.storage.journal_scan import scan_journal
from raftlog.testing.disk import CrashMode
from raftlog.testing.moves import Mover
from raftlog.testing.sim_cluster import SimCluster, broker_name
from raftlog.testing.swarm import Profile

CATCH_SECONDS: Final = 0.3
"""How long a power cut waits for bytes that are written and not synced, to hit them."""
USURP_SECONDS: Final = 4.0
"""How long another leader may take to be elected."""
FALL_BEHIND_SECONDS: Final = 12.0
"""How long retention may take to drop what a broker that is away has not got."""
ROOM_BYTES_MAX: Final = 96 << 10
_ONE_AWAY: Final = (
    "kill",
    "crash twice",
    "power cut",
    "isolate",
    "one way",
    "deafen",
    "usurp",
    "fall behind",
)
"""Faults that take one broker away."""
_READ_BYTES: Final = 1 << 20


class Nemesis:
    """Faults for one run.

    Args:
        cluster: to break.
        profile: which faults.
        crash_client: ends a random client's process; for the fault "client crash".
    """

    def __init__(self, cluster: SimCluster, profile: Profile, crash_client: Callable[[], None]) -> None:
        self.cluster = cluster
        self.profile = profile
        self.mover = Mover(cluster)
        self.fired: Counter[str] = Counter()
        self.log: list[str] = []
        """What was done, for people."""
        self.down: set[int] = set()
        self.cut: set[int] = set()
        self.lost: set[int] = set()
        self.suspect: set[int] = set()
        """Bits of their disk have changed: they run, and are not trusted."""
        self._crash_client = crash_client
        self._random = random.Random(0)
        self._faults: dict[str, Callable[[int], None]] = {
            "kill": self._kill,
            "crash twice": self._crash_twice,
            "power cut": self._power_cut,
            "isolate": self._isolate,
            "one way": self._one_way,
            "deafen": self._deafen,
            "usurp": self._usurp,
            "slow receiver": self._slow_receiver,
            "stall": self._stall,
            "pause": self._pause,
            "clock": self._clock,
            "full disk": self._full_disk,
            "failed sync": self._failed_sync,
            "transfer": self._transfer,
            "move": self._move,
            "fall behind": self._fall_behind,
            "rot": self._rot,
            "wipe": self._wipe,
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
        """How many more disks may be lost for good."""
        return (self.profile.replication - 1) // 2 - len(self.lost | self.suspect)

    # -- choosing --------------------------------------------------------------------------------------------

    def step(self, number: int) -> None:
        """Let some time pass, then do fault ``number`` (unless the profile skips it)."""
        rng = self._random = random.Random(f"fault {self.profile.seed}/{number}")
        self.cluster.loop.run_for(rng.uniform(*self.profile.gap_seconds))
        self.revive()
        if number in self.profile.skip:
            return
        possible = self._possible()
        if not possible:
            return
        name = rng.choices(list(possible), [self._weight(each) for each in possible])[0]
        self.fired[name] += 1
        self._say(f"fault {number}: {name}")
        possible[name]()

    def _weight(self, name: str) -> float:
        return 3.0 if name == "recover" else self.profile.weights[name]

    def _possible(self) -> dict[str, Callable[[], None]]:
        wanted = self.profile.weights
        up = [broker for broker in sorted(self.cluster.brokers) if broker not in self.cut]
        found: dict[str, Callable[[], None]] = {"client crash": self._crash_client}
        if self.profile.brokers > 1:
            found |= {"break": self._break, "clog": self._clog, "slow link": self._slow_link}
        if not self.down and not self.cut:
            found["blackout"] = self._blackout
        if self.spare > 0:
            found["split"] = self._split
        for name, fault in self._faults.items():
            victims = up
            if name in _ONE_AWAY and self.spare <= 0:
                continue
            if name in ("rot", "wipe") and (self.spare <= 0 or self.spare_copies <= 0):
                continue
            if name == "fall behind" and not self.profile.retains:
                continue
            if name == "move" and (self.profile.replication >= len(self._whole) or not self.mover.topics):
                continue
            if name in ("usurp", "deafen"):
                victims = [broker for broker in up if self._leads(broker)]
            if victims:
                victim = self._random.choice(victims)
                found[name] = lambda fault=fault, victim=victim: fault(victim)  # type: ignore[misc]
        found = {name: fault for name, fault in found.items() if name in wanted}
        if (self.down - self.lost) or self.cut:
            found["recover"] = self.recover
        return found

    def _say(self, what: str) -> None:
        self.log.append(f"{self.cluster.loop.time() - 1000:.3f} s  {what}")
        self.cluster.watch.note(what)

    # -- starting and stopping -------------------------------------------------------------------------------

    def revive(self) -> None:
        """Start anew the brokers that ended by themselves, as whoever hosts them does."""
        for broker_id, broker in list(self.cluster.brokers.items()):
            if broker.failed.done():
                self._say(f"broker {broker_id} ended: {broker.failed.result()}")
                self.cluster.kill_broker(broker_id)
                self.start(broker_id)

    @property
    def anyone_ended(self) -> bool:
        """Whether a broker that should run has ended by itself."""
        return any(broker.failed.done() for broker in self.cluster.brokers.values())

    def start(self, broker_id: int) -> None:
        """Start a broker. One whose data recovery refuses is lost, if a fault explains it."""
        self.down.discard(broker_id)
        for _ in range(3):
            try:
                self.cluster.start_broker(broker_id)
            except DataDirError as error:
                if not isinstance(error, DamagedData) or broker_id not in self.suspect:
                    raise
                self._say(f"broker {broker_id} refuses to start: {error}")
                self.fired["refused to start"] += 1
                self._lose(broker_id)
                return
            except (StorageFull, StorageFailed) as error:
                self._say(f"broker {broker_id} cannot start: {error}")
                self.cluster.disks[broker_id].capacity = None
            else:
                if broker_id in self.suspect:
                    self._scrub(broker_id)
                return
        raise AssertionError(f"broker {broker_id} does not start")

    def _scrub(self, broker_id: int) -> None:
        """Read all that a broker holds whose disk is not to be trusted; one with damage is taken away, as
        long as there is no repair in place."""
        broker = self.cluster.brokers[broker_id]
        try:
            for damage in broker.store.damaged.values():  # recovery found it by itself
                raise damage
            for replica in list(broker.replicas()):
                self.cluster.run(_read_all(replica), node=broker_name(broker_id))
        except (DamagedData, CorruptFrame) as error:
            self._say(f"broker {broker_id} reports damage: {error}")
            self.fired["damage reported"] += 1
            self.cluster.kill_broker(broker_id)
            self._lose(broker_id)

    def _lose(self, broker_id: int) -> None:
        self.lost.add(broker_id)
        self.cluster.watch.distrust(broker_id)

    def recover(self) -> None:
        """Start what is down, connect what is cut off."""
        for broker_id in sorted(self.down):
            self.start(broker_id)
        for broker_id in sorted(self.cut):
            self.cut.discard(broker_id)
            self.cluster.network.heal(broker_name(broker_id))

    def heal(self) -> None:
        """End every fault that can end."""
        self.revive()
        for disk in self.cluster.disks.values():
            disk.capacity = None
            disk.fail_sync(0)
        self.cluster.network.heal()
        self.recover()
        self._restore_latency()

    def _restore_latency(self) -> None:
        names = [broker_name(broker_id) for broker_id in self.cluster.disks]
        for a in names:
            self.cluster.network.read_slowly(a, None)
            for b in names:
                if a != b:
                    self.cluster.network.set_latency(a, b, *self.profile.latency)

    def heal_quorum(self) -> None:
        """Heal a random quorum of brokers among themselves; the others stay away or cannot be heard."""
        rng = random.Random(f"quorum {self.profile.seed}")
        chosen: set[int] = set()
        self.revive()
        for broker_id in rng.sample(self._whole, len(self._whole)):
            if 2 * len(chosen) > self.profile.brokers and self.mover.is_quorum(chosen):
                break
            chosen.add(broker_id)
        self.cluster.network.heal()
        self._restore_latency()
        for broker_id in sorted(chosen):
            self.cluster.disks[broker_id].capacity = None
            self.cluster.disks[broker_id].fail_sync(0)
            self.cut.discard(broker_id)
            if broker_id in self.down:
                self.start(broker_id)
        for broker_id in sorted(set(self.cluster.brokers) - chosen):
            rng.choice([self._kill, self._isolate, self._deafen])(broker_id)
        self._say(f"only brokers {sorted(chosen)} are healed")

    # -- network ---------------------------------------------------------------------------------------------

    def _pair(self) -> tuple[str, str]:
        a, b = self._random.sample(sorted(self.cluster.disks), 2)
        return broker_name(a), broker_name(b)

    def _break(self) -> None:
        self.cluster.network.break_connections(*self._pair())

    def _clog(self) -> None:
        self.cluster.network.clog(*self._pair(), self._random.uniform(0.1, 3.0))

    def _slow_link(self) -> None:
        least = self._random.uniform(0.01, 0.2)
        self.cluster.network.set_latency(*self._pair(), least, least * self._random.uniform(1.0, 3.0))

    def _slow_receiver(self, broker_id: int) -> None:
        """Its connections fill up, and those who send to it must bear that."""
        name, network = broker_name(broker_id), self.cluster.network
        network.read_slowly(name, self._random.choice([5e3, 50e3, 500e3]))
        self.cluster.loop.call_later(self._random.uniform(0.5, 5.0), network.read_slowly, name, None)

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
        few = self._random.sample(brokers, min(self.spare, len(brokers)))
        many = [broker_id for broker_id in self.cluster.disks if broker_id not in few]
        self.cut |= set(few)
        self.cluster.network.partition(
            [broker_name(broker_id) for broker_id in few], [broker_name(broker_id) for broker_id in many]
        )

    # -- processes -------------------------------------------------------------------------------------------

    def _kill(self, broker_id: int) -> None:
        self._catch_unsynced([broker_id])
        if broker_id in self.cluster.brokers:
            self.down.add(broker_id)
            self.cluster.kill_broker(broker_id)

    def _crash_twice(self, broker_id: int) -> None:
        """A kill, which leaves writes that no sync has covered, and a power cut soon after the restart."""
        self._kill(broker_id)
        self.start(broker_id)
        self.cluster.loop.run_for(self._random.uniform(0.01, 1.0))
        if broker_id in self.cluster.brokers:
            self.down.add(broker_id)
            self.cluster.cut_power(broker_id, self._mode())

    def _catch_unsynced(self, brokers: list[int]) -> None:
        """Run on until one of these disks is in the middle of a write, if that comes soon."""
        disks = [self.cluster.disks[broker_id] for broker_id in brokers]
        loop = self.cluster.loop
        until = loop.time() + CATCH_SECONDS
        if self._random.random() < 0.3:
            for disk in disks:
                loop.call_soon(disk.stall, CATCH_SECONDS)  # whoever does not wait for it is found out
            loop.run_for(CATCH_SECONDS * self._random.random())
        loop.run_until(
            lambda: loop.time() >= until or any(disk.unsynced_bytes for disk in disks), 10 * CATCH_SECONDS
        )

    def _mode(self) -> CrashMode:
        return self._random.choice([CrashMode.RANDOM, CrashMode.NONE, CrashMode.PREFIX, CrashMode.ALL])

    def _power_cut(self, broker_id: int) -> None:
        self._catch_unsynced([broker_id])
        self.down.add(broker_id)
        self.cluster.cut_power(broker_id, self._mode())

    def _blackout(self) -> None:
        """All brokers lose power at once: only what was synced is left."""
        brokers = sorted(self.cluster.brokers)
        self._catch_unsynced(brokers)
        mode = self._mode()
        for broker_id in brokers:
            self.down.add(broker_id)
            self.cluster.cut_power(broker_id, mode)
        self.cluster.loop.run_for(0.1)
        for broker_id in self._random.sample(brokers, len(brokers)):
            self.start(broker_id)

    def _pause(self, broker_id: int) -> None:
        loop, name = self.cluster.loop, broker_name(broker_id)
        loop.pause(name)
        loop.run_for(self._random.uniform(0.1, 4.0))
        loop.resume(name)

    def _clock(self, broker_id: int) -> None:
        jump = self._random.choice([-1, 1]) * self._random.choice([50, 5_000, 3_600_000])
        drift = self._random.uniform(-0.2, 0.2)
        self.cluster.loop.adjust_clock(broker_name(broker_id), jump_ms=jump, drift=drift)

    def _transfer(self, broker_id: int) -> None:
        """Hand over the leadership of everything that the broker leads."""
        loop = self.cluster.loop
        broker = self.cluster.brokers[broker_id]
        for replica in list(broker.replicas()):
            node = replica.node
            if node.role is Role.LEADER and replica.fault is None and node.progress:
                to = self._random.choice(sorted(node.progress))
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
        self._say(self.mover.move(self._random, self._whole, broker_id))

    def _fall_behind(self, broker_id: int) -> None:
        """A broker is away until others have dropped entries that it has not got, if that comes soon."""
        ends = {replica.log.spec.partition: replica.log.last_index for replica in self._partitions(broker_id)}
        self._random.choice([self._kill, self._isolate])(broker_id)
        loop = self.cluster.loop
        until = loop.time() + FALL_BEHIND_SECONDS

        def is_behind() -> bool:
            return loop.time() >= until or any(
                replica.log.first_index > ends.get(replica.log.spec.partition, 1 << 62)
                for other in self.cluster.brokers
                if other != broker_id
                for replica in self._partitions(other)
            )

        loop.run_until(is_behind, 10 * FALL_BEHIND_SECONDS)

    # -- disks -----------------------------------------------------------------------------------------------

    def _stall(self, broker_id: int) -> None:
        disk, seconds = self.cluster.disks[broker_id], self._random.uniform(0.1, 3.0)
        self.cluster.loop.call_soon(disk.stall, seconds)

    def _leads(self, broker_id: int) -> bool:
        """Whether the broker leads a partition and serves it."""
        return any(replica.staged is not None for replica in self._partitions(broker_id))

    def _partitions(self, broker_id: int) -> list[PartitionReplica]:
        replicas = self.cluster.brokers[broker_id].replicas()
        return [replica for replica in replicas if isinstance(replica, PartitionReplica)]

    def _usurp(self, broker_id: int) -> None:
        """A leader whose disk stands still is heard no more: it takes writes that nobody else gets, and the
        next leader cuts them off while they are still on their way to the disk."""
        rng, loop = self._random, self.cluster.loop
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
        rng, loop = self._random, self.cluster.loop
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

    def _full_disk(self, broker_id: int) -> None:
        disk = self.cluster.disks[broker_id]
        disk.capacity = disk.used_bytes + self._random.randrange(ROOM_BYTES_MAX)
        self.cluster.loop.call_later(self._random.uniform(0.2, 4.0), self._make_room, broker_id)

    def _make_room(self, broker_id: int) -> None:
        self.cluster.disks[broker_id].capacity = None

    def _failed_sync(self, broker_id: int) -> None:
        """The next sync fails. What it covered can be read until the power is cut and is not on the device,
        and no later sync says so. The process ends and is started anew: recovery writes again what it read,
        so nothing that it vouches for depends on the sync that failed."""
        self.cluster.disks[broker_id].fail_sync(1)

    def _rot(self, broker_id: int) -> None:
        """Kill a broker, change a few bytes of its disk, start it: it may refuse, it may not lie.

        What the journal holds above its sync floor is spared: damage there cannot be told from a torn write,
        and recovery rightly cuts it.
        """
        self.suspect.add(broker_id)
        self.cluster.kill_broker(broker_id)
        disk = self.cluster.disks[broker_id]
        scan = self.cluster.run(scan_journal(disk, None))
        sizes = {path: len(disk.content(path)) for path in disk.paths()}
        for file in scan.files:
            floor = min(file.end, scan.floor) - file.base
            sizes[file.path] = FILE_HEADER_BYTES + floor if floor > 0 else 0
        paths = [path for path, size in sizes.items() if size]
        for _ in range(self._random.randint(1, 3)):
            path = self._random.choice(paths)
            position = self._random.randrange(sizes[path])
            disk.flip(path, position, 1 << self._random.randrange(8))
            self._say(f"rot in {path} at {position}")
        self.start(broker_id)

    def _wipe(self, broker_id: int) -> None:
        """The directory is gone: the broker stays away."""
        self.cluster.kill_broker(broker_id)
        disk = self.cluster.disks[broker_id]
        for path in disk.paths():
            disk.put(path, b"")
        self._lose(broker_id)


async def _read_all(replica: Replica[Any]) -> None:
    log, index = replica.log, replica.log.first_index
    while index <= replica.node.applied:
        entries = await log.entries(index, replica.node.applied + 1, _READ_BYTES)
        index = entries[-1].index + 1
