"""Brokers on hosts of their own: each in a network namespace, with a cable to one switch. Cables can be cut.

::

    [ns 0: broker, 10.213.N.1]   [ns 1]   [ns 2]          the test: 10.213.N.254
             |                      |        |                      |
             +----------------------+--------+----------- bridge ---+
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from raftlog.broker.founding import FoundingPlan, found
from raftlog.client.cluster import Bootstrap
from raftlog.client.log import Log
from raftlog.storage.identity import store_identity
from raftlog.storage.real_disk import RealDisk

HERE = Path(__file__).parent
PORT = 7400
WAIT_S = 60.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why namespaces cannot be had here; "" if they can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no iproute2 here"
    name = f"rlprobe{os.getpid()}"
    try:
        ip("netns", "add", name)
        try:
            ip("link", "add", name[-15:], "type", "bridge")
            ip("link", "del", name[-15:])
        finally:
            ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


def wait_for(what: str, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        pause.wait(0.02)


def close(process: subprocess.Popen[str]) -> None:
    """The pipes of a process that has ended."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


class Writer:
    """A process that sends records, in a namespace or beside the test."""

    def __init__(self, network: Network, name: str, host: int | None) -> None:
        where = [] if host is None else ["ip", "netns", "exec", network.namespace(host)]
        plan = network.plan
        hosts = range(network.count) if host is None else [host]
        addresses = [f"{network.address(each)}:{PORT}" for each in hosts]
        program = [sys.executable, str(HERE / "netns_writer.py"), name, plan.cluster_id, plan.secret.hex()]
        self.acknowledged: list[str] = []
        self.failed: list[str] = []
        self._process = subprocess.Popen(
            [*where, *program, *addresses], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            outcome, value = line.split()
            (self.acknowledged if outcome == "acknowledged" else self.failed).append(value)

    def wait_for(self, count: int, what: str) -> None:
        """Until so many more are acknowledged."""
        before = len(self.acknowledged)
        wait_for(what, lambda: len(self.acknowledged) >= before + count)

    def stop(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(WAIT_S)
        self._thread.join(WAIT_S)
        close(self._process)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(WAIT_S)
        close(self._process)


class Network:
    """A founded cluster whose brokers are on hosts of their own.

    Args:
        data: where they keep their data.
        count: how many.
    """

    def __init__(self, data: Path, count: int = 3) -> None:
        self.data = data
        self.count = count
        self.plan = FoundingPlan.new("netns", range(count))
        self._tag = f"rl{os.getpid() % 100_000}"
        self._subnet = f"10.213.{os.getpid() % 250 + 1}"
        self._brokers: dict[int, subprocess.Popen[str]] = {}
        self._writers: list[Writer] = []
        self._log: Log | None = None

    def namespace(self, host: int) -> str:
        return f"{self._tag}n{host}"

    def address(self, host: int) -> str:
        return f"{self._subnet}.{host + 1}"

    def _cable(self, host: int) -> str:
        """The switch's end of a host's cable."""
        return f"{self._tag}v{host}"

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        bridge = f"{self._tag}b"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self._subnet}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in range(self.count):
            space, inner = self.namespace(host), f"{self._tag}i{host}"
            ip("netns", "add", space)
            ip("link", "add", self._cable(host), "type", "veth", "peer", "name", inner)
            ip("link", "set", inner, "netns", space)
            ip("link", "set", self._cable(host), "master", bridge)
            ip("link", "set", self._cable(host), "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", inner)
            ip("-n", space, "link", "set", inner, "up")
        asyncio.run(self._found())
        for host in range(self.count):
            self._start_broker(host)
        for process in self._brokers.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
        bootstrap = Bootstrap(
            "netns",
            self.plan.cluster_id,
            self.plan.secret,
            tuple((self.address(host), PORT) for host in range(self.count)),
        )
        self._log = Log(bootstrap)
        self._log.create_topic("t", partitions=1, replication_factor=self.count)

    async def _found(self) -> None:
        addresses = {host: (0, self.address(host), PORT) for host in range(self.count)}
        for host in range(self.count):
            disk = RealDisk(self.data / f"broker-{host}")
            identity = await found(disk, self.plan, host)
            await store_identity(disk, msgspec.structs.replace(identity, addresses=addresses))
            await disk.close()

    def _start_broker(self, host: int) -> None:
        self._brokers[host] = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.namespace(host)),
                *(sys.executable, str(HERE / "netns_broker.py")),
                *(str(self.data / f"broker-{host}"), self.address(host), str(PORT)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop_brokers(self) -> None:
        """In order."""
        if self._log is not None:
            self._log.close()
            self._log = None
        for process in self._brokers.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._brokers.values():
            process.wait(WAIT_S)
            close(process)
        self._brokers.clear()

    def remove(self) -> None:
        """Everything, however far it got."""
        for writer in self._writers:
            writer.kill()
        if self._log is not None:
            self._log.close()
        for process in self._brokers.values():
            process.kill()
            process.wait()
            close(process)
        for host in range(self.count):
            subprocess.run(["ip", "netns", "del", self.namespace(host)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", self._cable(host)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._tag}b"], capture_output=True, check=False)

    # -- looking ---------------------------------------------------------------------------------------------

    @property
    def log(self) -> Log:
        assert self._log is not None
        return self._log

    def leader(self) -> int:
        """The broker that leads the topic's partition."""
        found: list[int] = []

        def is_led() -> bool:
            leader = self.log.describe_topic("t").partitions[0].leader
            found[:] = [] if leader is None else [leader]
            return bool(found)

        wait_for("a leader", is_led)
        return found[0]

    def writer(self, name: str, host: int | None = None) -> Writer:
        writer = Writer(self, name, host)
        self._writers.append(writer)
        return writer

    # -- faults ----------------------------------------------------------------------------------------------

    def cut(self, host: int) -> None:
        """Pull a host's cable."""
        ip("link", "set", self._cable(host), "down")

    def mend(self, host: int) -> None:
        ip("link", "set", self._cable(host), "up")

    def deafen(self, sender: int, receiver: int) -> None:
        """Nothing that one host sends reaches the other; the other way all arrives."""
        ip("-n", self.namespace(sender), "route", "add", "blackhole", f"{self.address(receiver)}/32")

    def undeafen(self, sender: int, receiver: int) -> None:
        ip("-n", self.namespace(sender), "route", "del", "blackhole", f"{self.address(receiver)}/32")

    def slow(self, host: int, rate: str) -> None:
        """What goes to a host passes at that rate, queued."""
        command = f"tc qdisc add dev {self._cable(host)} root tbf rate {rate} burst 4kb latency 500ms"
        subprocess.run(command.split(), check=True, capture_output=True)

    def unslow(self, host: int) -> None:
        subprocess.run(["tc", "qdisc", "del", "dev", self._cable(host), "root"], check=True)
