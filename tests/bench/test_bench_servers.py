"""Whatever a system starts ends with it, also where the process that started it is killed."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from contenders.base import System, Unavailable

SLEEP = "import signal; print('up', flush=True); signal.pause()"
PARENT = f"""
import sys, signal
from pathlib import Path
from contenders.base import System
system, output = System(), Path(sys.argv[1])
system.spawn([sys.executable, "-c", {SLEEP!r}], output)
system.wait_until(lambda: "up" in output.read_text(), "it is up")
print(system.pids()[0], flush=True)
signal.pause()
"""


def test_a_system_ends_its_processes(tmp_path: Path) -> None:
    system = System()
    system.spawn([sys.executable, "-c", SLEEP], tmp_path / "output")
    (pid,) = system.pids()
    process = system.processes[0]
    system.wait_until(lambda: "up" in (tmp_path / "output").read_text(), "it is up")
    system.stop()
    assert process.returncode == -signal.SIGTERM
    assert system.pids() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_ends_makes_its_system_unavailable(tmp_path: Path) -> None:
    system = System()
    system.spawn([sys.executable, "-c", "pass"], tmp_path / "output")
    with pytest.raises(Unavailable, match="ended instead of: it is up"):
        system.wait_until(lambda: False, "it is up", timeout=30)
    system.stop()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_server_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    bench = Path(__file__).parents[2] / "bench"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "output")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(bench)},
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait(10)
        assert select.select([child], [], [], 10)[0], "the server survives"
    finally:
        os.close(child)
