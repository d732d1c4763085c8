"""Everything at once: records come and go by retention while brokers die, lose power and are cut off, so
that followers keep needing snapshots. In the end the log holds what was acknowledged, the same everywhere."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from host_kit import SEGMENT_BYTES, TOPIC, Host

from raftlog.broker import retention, snapshots
from raftlog.client.producer import ProducerCore
from raftlog.config import ProducerConfig
from raftlog.testing.sim_cluster import broker_name

VALUES = 500


class Chaos:
    """One run under a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.host = Host(
            seed,
            topic={"retention_bytes": self.random.choice([0, SEGMENT_BYTES])},
            election_timeout_ms=self.random.choice([300, 1000]),
            heartbeat_ms=100,
            cache_bytes_max=self.random.choice([0, 64 << 10]),
        )
        self.acknowledged: dict[int, bytes] = {}
        self.counts: Counter[str] = Counter()
        self._away: int | None = None
        self._cut = False

    async def write(self) -> None:
        """One value after another, each sent until it is acknowledged."""
        host = self.host
        client = host.client("writer")
        config = ProducerConfig(linger_ms=0, compression="none", request_timeout_ms=1000)
        producer = ProducerCore(client, config, host.loop, host.loop.call_soon)
        await producer.load_topic(TOPIC, 60.0)
        for number in range(VALUES):
            value = b"%d:" % number + b"x" * 3000
            metadata = await producer.send(TOPIC, value, None, (), 0, None)
            assert metadata.offset not in self.acknowledged
            self.acknowledged[metadata.offset] = value
            await asyncio.sleep(self.random.uniform(0, 0.01))
        producer.sender.stop()
        await client.close()

    def run(self) -> None:
        host = self.host
        writer = host.loop.run_as("writer", self.write())
        while not writer.done():
            host.loop.run_for(self.random.uniform(0.01, 1.5))
            self.fault()
        writer.result()
        if self._away is not None:
            self.revive()
        host.wait(lambda: host.leader_id is not None and host.is_equal(), 120.0)
        self.count_installs()
        self.check()
        host.close()

    # -- faults: one broker at a time is away ----------------------------------------------------------------

    def fault(self) -> None:
        if self._away is not None:
            self.revive()
            return
        victim = self._away = self.random.choice(sorted(self.host.cluster.brokers))
        self._cut = False
        self.count_installs(victim)
        match self.random.randrange(4):
            case 0:
                self.host.cluster.kill_broker(victim)
            case 1 | 2:
                self.host.cluster.cut_power(victim)
            case _:
                self._cut = True
                for other in self.host.cluster.disks:
                    if other != victim:
                        self.host.cluster.network.cut(broker_name(victim), broker_name(other), both=True)

    def revive(self) -> None:
        victim, self._away = self._away, None
        assert victim is not None
        if self._cut:
            self.host.cluster.network.heal()
        else:
            self.host.cluster.start_broker(victim)

    def count_installs(self, *broker_ids: int) -> None:
        for broker_id in broker_ids or self.host.cluster.brokers:
            replica = self.host.find(broker_id)
            if replica is not None:
                self.counts["installs"] += replica.snapshots_installed
                replica.snapshots_installed = 0

    # -- the accounts ----------------------------------------------------------------------------------------

    def check(self) -> None:
        host = self.host
        start = host.leader.machine.log_start
        assert sorted(self.acknowledged) == list(range(VALUES))
        self.counts["dropped"] += start
        records = host.consume()
        assert [record.offset for record in records] == list(range(start, VALUES))
        for record in records:
            assert bytes(record.value or b"") == self.acknowledged[record.offset]
        replicas = [host.replica(broker_id) for broker_id in sorted(host.cluster.brokers)]
        first = max(replica.log.first_index for replica in replicas)
        end = replicas[0].log.last_index + 1
        sums = [host.cluster.run(replica.log.checksum(first, end)) for replica in replicas]
        assert len(set(sums)) == 1
        for replica in replicas:
            assert replica.fault is None
            assert replica.log.start_offset <= start, "nothing that may be read is missing"


def test_under_faults_and_retention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "HOUSEKEEPING_S", 0.2)
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 150)
    counts: Counter[str] = Counter()
    for seed in range(6):
        run = Chaos(seed)
        run.run()
        counts += run.counts
    assert counts["installs"] >= 5
    assert counts["dropped"] >= 6 * 100
