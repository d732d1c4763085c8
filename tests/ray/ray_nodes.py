"""Ray for tests. In the process itself, or as an operator starts it: by ``ray start``, a head and workers,
each with a disk of its own; and killed, process by process. And how to wait for what comes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray

BIN = Path(sys.executable).parent
START_ATTEMPTS = 2
"""Of a node: now and then one of Ray's servers does not come up."""
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(what: str, condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Look again and again until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        threading.Event().wait(0.1)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have, as Linux lists them."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = status.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


@contextlib.contextmanager
def local_ray(**settings: Any) -> Iterator[str]:
    """A Ray of this process's own, on the loopback interface and quiet; gives its address.

    Args:
        settings: what else ``ray.init`` is told.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        **settings,
    )
    try:
        yield started.address_info["gcs_address"]
    finally:
        ray.shutdown()


def ray_of_all() -> contextlib.AbstractContextManager[object]:
    """The Ray that tests share in which nothing happens to Ray itself: the one that runs, or a local one."""
    return contextlib.nullcontext() if ray.is_initialized() else local_ray()


class RayNodes:
    """A Ray cluster.

    Args:
        disks: folder of the nodes' disks; node N's is ``$RAFTLOG_DISK``, its ``disk-N``.
        sessions: where Ray keeps its own; a short path, for there are sockets below it.
        count: how many nodes.
    """

    def __init__(self, disks: Path, sessions: str, count: int) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.client_address = f"ray://127.0.0.1:{free_port()}"
        self.environment = {**os.environ, **SECRET, "RAY_ADDRESS": self.address}
        self._disks = disks
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        port, client_port = (each.rpartition(":")[2] for each in (self.address, self.client_address))
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client_port}"]
        self._head = [*head, "--include-dashboard=false", f"--temp-dir={sessions}"]
        try:
            for number in range(count):
                self.start(number)
            self.until_alive(count)
        except BaseException:  # also interrupted: nothing of it may stay
            self.kill()
            raise

    def start(self, number: int) -> None:
        """Start Ray on a node; node 0 is the head. Returns when its processes run: two that start at a time
        on one machine get in each other's way."""
        role = [f"--address={self.address}"] if number else self._head
        said = self._disks / f"ray-start-{number}.txt"
        environ = {**os.environ, **SECRET, "RAFTLOG_DISK": str(self._disks / f"disk-{number}")}

        def runs() -> bool:
            ended = node.poll() is not None
            assert not ended, f"ray start ended: {said.read_text()[-2000:]}"
            return "Ray runtime started" in said.read_text()

        for attempt in range(START_ATTEMPTS):  # its ports are free when they are chosen, and may not stay so
            ports = [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
            with said.open("wb") as output:
                self._nodes[number] = node = subprocess.Popen(
                    [
                        str(BIN / "ray"),
                        "start",
                        *role,
                        *ports,
                        "--num-cpus=1",
                        "--block",
                        "--disable-usage-stats",
                    ],
                    stdout=output,
                    stderr=output,
                    env=environ,
                    start_new_session=True,
                )
            try:
                until(f"node {number} runs", runs)
            except AssertionError:
                if attempt == START_ATTEMPTS - 1:
                    raise
                self.kill(number)
            else:
                return

    def run(self, *command: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Ray or raftlog, as its user."""
        program = [str(BIN / command[0]), *command[1:]]
        return subprocess.run(
            program, capture_output=True, text=True, timeout=180, env=self.environment, input=input
        )

    def raftlog(self, *arguments: str, input: str | None = None) -> str:
        """What a command of raftlog prints that ends well."""
        done = self.run("raftlog", *arguments, input=input)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def values(self, topic: str) -> list[int]:
        """The numbers that were produced to a topic, sorted."""
        return sorted(map(int, self.raftlog("consume", topic, "--format", "%v").split()))

    def until_alive(self, nodes: int) -> None:
        def are_there() -> bool:
            return self.run("ray", "status").stdout.count(" 1 node_") == nodes

        until(f"{nodes} nodes", are_there)

    def kill(self, *numbers: int) -> None:
        """SIGKILL every process of these nodes (of all, if none is named), by its id."""
        chosen = [self._nodes.pop(number) for number in numbers or list(self._nodes)]
        pids = [pid for node in chosen if node.poll() is None for pid in (node.pid, *descendants(node.pid))]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it went with another one
                os.kill(pid, signal.SIGKILL)
        for node in chosen:
            node.wait(30)
        until("they are gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
