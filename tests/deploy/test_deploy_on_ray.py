"""A Ray cluster by the start commands of the deployment files, of two nodes on this machine: a head without
CPUs, as on Kubernetes, and a worker. raftlog on it, and the pipeline."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_nodes import BIN, free_port, until

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
HAS_JOBS = importlib.util.find_spec("aiohttp_cors") is not None
"""`ray job submit` is part of ray[default]; with less of Ray the pipeline is run as a driver."""


def ray_start(kind: str, port: int) -> list[str]:
    """What cluster.yaml starts Ray with on a head or worker, on other ports; no autoscaler, for there is one
    machine."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    command = config[f"{kind}_start_ray_commands"][-1].split("; ")[-1]
    command = command.replace("$RAY_HEAD_IP", "127.0.0.1").replace("6379", str(port))
    program, *arguments = shlex.split(command)
    assert program == "~/raftlog-venv/bin/ray"
    return [str(BIN / "ray"), *(each for each in arguments if not each.startswith("--autoscaling-config"))]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of whoever uses the cluster, once that runs."""
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions:  # a short path: there are sockets below it
        port, dashboard = free_port(), free_port()
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
        common = [f"--dashboard-agent-listen-port={free_port()}", "--block", "--disable-usage-stats"]
        head = ["--num-cpus=0", f"--temp-dir={sessions}", f"--dashboard-port={dashboard}"]
        nodes = []
        try:
            for kind, arguments in (("head", head), ("worker", ["--num-cpus=2"])):
                command = [*ray_start(kind, port), *arguments, *common]
                output = (tmp_path / f"{kind}.out").open("wb")
                node = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **secret},
                    start_new_session=True,
                )
                nodes.append(node)
                common[0] = f"--dashboard-agent-listen-port={free_port()}"
            yield {
                **os.environ,
                **secret,
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            }
        finally:
            for node in reversed(nodes):
                os.killpg(node.pid, signal.SIGKILL)
                node.wait(30)


def test_the_pipeline_runs_on_a_cluster_started_so(environment: dict[str, str], tmp_path: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    data_dir = str(tmp_path / "data")
    until("Ray's nodes are up", lambda: "2.0 CPU" in run(str(BIN / "ray"), "status").stdout)
    started = run(str(BIN / "raftlog"), "start", "--data-dir", data_dir)
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("alive") == 1, "a broker on the worker, and none on the head"
    pipeline = [sys.executable, str(ROOT / "deploy/pipeline.py"), "--data-dir", data_dir, "--orders", "100"]
    submit = [str(BIN / "ray"), "job", "submit", "--"] if HAS_JOBS else []
    done = run(*submit, *pipeline)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 orders billed now; 100 orders, 100 invoices" in done.stdout


def test_a_node_without_cpus_is_none_for_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from raftlog.actors.hands import alive_nodes

    def node(name: str, alive: bool = True, **resources: float) -> dict[str, object]:
        return {"NodeID": name, "NodeManagerAddress": "192.0.2.1", "Alive": alive, "Resources": resources}

    there = [
        node("head", memory=1.0),
        node("zero", CPU=0.0),
        node("worker", CPU=2.0),
        node("gone", False, CPU=2.0),
    ]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    assert list(alive_nodes()) == ["worker"]
