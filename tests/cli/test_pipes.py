"""Real processes, pipes and signals: followed output, a reader that goes away, Ctrl-C."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raftlog.testing.local_cluster import LocalCluster

SCRIPT = """
import pickle, sys
from raftlog.cli.main import app
from raftlog.cli.session import Session
log = pickle.loads(bytes.fromhex(sys.argv.pop(1)))
app(obj=Session(connect=lambda name: log, start=None, shutdown=None, plan=None))
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def command(cluster: LocalCluster, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, on the cluster of this one."""
    pickled = pickle.dumps(cluster.log).hex()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pickled, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def end(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Exit code and stderr of a process that ends by itself."""
    assert process.stderr is not None
    code = process.wait(timeout=30)
    return code, process.stderr.read()


def topic_with(run: Callable[..., Any], name: str, lines: int) -> str:
    assert run("topics", "create", name).exit_code == 0
    assert run("produce", name, input="".join(f"{i}\n" for i in range(lines))).exit_code == 0
    return name


def test_follow_prints_a_record_as_soon_as_it_is_there(
    cluster: LocalCluster, run: Callable[..., Any]
) -> None:
    topic = topic_with(run, "followed", 2)
    with command(cluster, "consume", topic, "--follow", "--format", "%o %v") as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"0 0\n", b"1 1\n"]
        assert run("produce", topic, input="new\n").exit_code == 0
        assert process.stdout.readline() == b"2 new\n"
        process.send_signal(signal.SIGINT)
        assert end(process) == (130, b"")


def test_from_end_prints_what_comes_later_only(cluster: LocalCluster, run: Callable[..., Any]) -> None:
    topic = topic_with(run, "tailed", 3)
    with command(
        cluster, "consume", topic, "--from", "end", "--follow", "-n", "1", "--format", "%p %o %k %v"
    ) as process:
        assert process.stdout is not None
        with cluster.log.producer() as producer:
            offset = None
            while not readable(process):  # until the consumer stands at the end
                offset = producer.send(topic, b"new", key=b"k").result(timeout=10).offset
        line = process.stdout.readline()
        assert end(process) == (0, b"")
    assert offset is not None
    found = line.split()
    assert (found[0], found[2:]) == (b"0", [b"k", b"new"])
    assert 3 <= int(found[1]) <= offset


def readable(process: subprocess.Popen[bytes]) -> bool:
    return bool(select.select([process.stdout], [], [], 0.05)[0])


def test_a_reader_that_goes_away_ends_it_quietly(cluster: LocalCluster, run: Callable[..., Any]) -> None:
    topic = topic_with(run, "headed", 50_000)  # far more than a pipe holds
    with command(cluster, "consume", topic) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert end(process) == (0, b"")


def test_a_follower_without_records_notices_that_its_reader_is_gone(
    cluster: LocalCluster, run: Callable[..., Any]
) -> None:
    topic = topic_with(run, "silent", 1)
    with command(cluster, "consume", topic, "--follow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert end(process) == (0, b"")


def test_ctrl_c_while_producing_keeps_what_was_read(cluster: LocalCluster, run: Callable[..., Any]) -> None:
    topic = topic_with(run, "interrupted", 0)
    with command(cluster, "produce", topic) as process, cluster.log.consumer(topic) as consumer:
        assert process.stdin is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert [record.value for record in consumer.poll(timeout=20)] == [b"one"]
        process.send_signal(signal.SIGINT)
        assert end(process) == (130, b"")


def test_a_producer_writes_a_line_as_soon_as_it_comes(cluster: LocalCluster, run: Callable[..., Any]) -> None:
    topic = topic_with(run, "typed", 0)
    with command(cluster, "produce", topic) as process, cluster.log.consumer(topic) as consumer:
        assert process.stdin is not None
        for line in (b"one", b"two"):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            assert [record.value for record in consumer.poll(timeout=20)] == [line]
        process.stdin.close()
        assert end(process) == (0, b"2 records acknowledged\n")
