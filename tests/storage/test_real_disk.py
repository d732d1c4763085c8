"""The Disk of production, and a store on it."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from storage_kit import DISK_ID, SMALL, Writer, contents, grow, run, spec, submit

from raftlog.errors import DataDirError, DataDirLocked, StorageFailed, StorageFull
from raftlog.storage import real_disk
from raftlog.storage.disk import DiskFile, Write
from raftlog.storage.identity import Identity, store_identity
from raftlog.storage.real_disk import RealDisk
from raftlog.storage.store import BrokerStore
from raftlog.storage.verify import verify


def test_store_on_a_real_directory(tmp_path: Path) -> None:
    async def main() -> None:
        store = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        small, large = await store.create_many([spec(1), spec(2)])
        expected = [[bytes(e.frame) for e in await grow(store, small, 60)]]
        expected.append([bytes(e.frame) for e in await grow(store, large, 8, size=3000)])
        await store.flush()
        assert [await contents(small), await contents(large)] == expected
        await store.close()
        assert not (await verify(RealDisk(tmp_path))).problems
        # A second life that is killed, not stopped: the directory's lock goes with the process only.
        store = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        assert store.was_clean
        assert [await contents(log) for log in store.logs.values()] == expected
        await grow(store, store.logs[1], 3)
        store._disk._lock_fd = _close(store._disk._lock_fd)  # type: ignore[attr-defined]
        again = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        assert not again.was_clean
        assert len(await contents(again.logs[1])) == 63
        await again.close()

    run(main())


def test_abort_leaves_what_a_kill_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged is there, nothing is logged or left running, and the directory is free."""
    monkeypatch.setattr(real_disk, "_SMALL_BYTES", -1)  # so that there is something under way

    async def main() -> None:
        store = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        log = await store.create(spec(1))
        expected = [bytes(entry.frame) for entry in await grow(store, log, 80, size=900)]
        late = submit(store, log, [Writer(log).entry(1)])
        waiting = asyncio.ensure_future(store._journal.checkpoint([log]))  # someone who waits for the journal
        await store.abort()
        await store.abort()
        assert not late.done()
        assert waiting.cancelled() or waiting.cancelling() or not waiting.done()
        assert {task.get_name() for task in asyncio.all_tasks()} & {
            "raftlog-journal",
            "raftlog-flusher",
        } == set()
        again = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        assert not again.was_clean
        assert (await contents(again.logs[1]))[:80] == expected
        await again.close()

    run(main())
    assert not caplog.records


def _close(fd: int) -> int:
    os.close(fd)
    return -1


def test_commits_are_served_in_order_and_short_writes_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    pwritev = os.pwritev

    def short(fd: int, buffers: list[bytes], position: int) -> int:
        written.append(position)
        joined = b"".join(buffers)
        return pwritev(fd, [joined[: max(1, len(joined) * 2 // 3)]], position)

    monkeypatch.setattr(real_disk.os, "pwritev", short)

    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a/b", create=True)
        parts = [bytes([n % 256]) * (n % 50) for n in range(3000)]
        first = asyncio.ensure_future(disk.commit([Write(file, 0, parts)]))
        second = asyncio.ensure_future(disk.commit([Write(file, 0, [b"later"])]))
        await asyncio.gather(first, second)
        expected = b"later" + b"".join(parts)[5:]
        assert await disk.read_file("a/b") == expected
        assert await file.read(3, 10) == expected[3:13]
        assert await file.read(len(expected) - 2, 10) == expected[-2:]
        assert file.try_read(0, 20) in (None, expected[:20])
        file.close()
        file.close()
        await disk.close()

    run(main())
    assert len(written) > 10


def test_files_and_names(tmp_path: Path) -> None:
    async def main() -> None:
        disk = RealDisk(tmp_path / "new" / "dir")
        with pytest.raises(FileNotFoundError):
            await disk.open("missing")
        file = await disk.open("x/one", create=True, allocate=8192)
        assert await disk.file_size("x/one") == 8192
        await disk.truncate(file, 100)
        assert await disk.file_size("x/one") == 100
        await disk.replace_file("x/two", b"content")
        assert await disk.list("x") == ["one", "two"]
        assert await disk.list("y") == []
        await disk.rename("x/two", "y/three")
        assert await disk.read_file("y/three") == b"content"
        assert await disk.exists("y/three")
        assert not await disk.exists("x/two")
        await disk.remove("y/three")
        await disk.remove("y/three")
        await disk.remove_tree("x")
        await disk.remove_tree("x")
        assert await disk.list("x") == []
        assert await disk.free_bytes() > 0
        file.close()
        await disk.close()
        await disk.close()

    run(main())


def test_the_identity_is_for_its_owner_only(tmp_path: Path) -> None:
    async def main() -> None:
        disk = RealDisk(tmp_path)
        await store_identity(disk, Identity("c", "name", 1, DISK_ID, 1, b"secret", 1))
        await disk.close()

    run(main())
    assert stat.S_IMODE((tmp_path / "IDENTITY").stat().st_mode) == 0o600


def test_errors_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And after each of them the next valid request succeeds."""

    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a", create=True)

        def no_room(*_: object) -> int:
            raise OSError(28, "No space left on device")

        def broken(*_: object) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(real_disk.os, "pwritev", no_room)
            with pytest.raises(StorageFull):
                await disk.commit([Write(file, 0, [b"x"])])
            with pytest.raises(StorageFull):
                await disk.write([Write(file, 0, [b"x"])])
            with pytest.raises(StorageFull):
                await disk.replace_file("b", b"y")
        with monkeypatch.context() as patch:
            patch.setattr(real_disk.os, "fdatasync", broken)
            with pytest.raises(StorageFailed):
                await disk.commit([Write(file, 0, [b"x"])])
        await disk.commit([Write(file, 0, [b"xyz"])])
        assert await disk.read_file("a") == b"xyz"
        assert await disk.list(".") == ["a"]
        await disk.close()
        with pytest.raises(StorageFailed):
            await disk.commit([Write(file, 0, [b"x"])])

    run(main())


def test_a_directory_in_use_names_the_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, pathlib, sys\n"
            "from raftlog.storage.real_disk import RealDisk\n"
            f"asyncio.run(RealDisk(pathlib.Path({str(tmp_path)!r})).lock())\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(real_disk.__file__).parents[2],
    )
    assert holder.stdin is not None
    assert holder.stdout is not None

    async def main() -> None:
        disk = RealDisk(tmp_path)
        with pytest.raises(DataDirLocked, match=str(holder.pid)):
            await BrokerStore.open(disk, SMALL, disk_id=DISK_ID)
        holder.communicate("")
        store = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        await store.close()

    try:
        assert holder.stdout.readline() == "locked\n"
        run(main())
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataDirError, match="not writable"):
        RealDisk(tmp_path)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirError, match="cannot make"):
        RealDisk(tmp_path / "file" / "data")


def test_files_closed_under_an_operation_stay_open_until_it_ends(tmp_path: Path) -> None:
    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a", create=True)
        write = asyncio.ensure_future(disk.commit([Write(file, 0, [b"x" * 100_000])]))
        await asyncio.sleep(0)
        file.close()
        other = await disk.open("b", create=True)  # would be given the same descriptor
        await write
        assert await disk.file_size("a") == 100_000
        assert await disk.file_size("b") == 0
        with pytest.raises(StorageFailed):
            await disk.commit([Write(file, 0, [b"x"])])
        other.close()
        await disk.close()

    run(main())


def test_group_commit_on_a_real_disk(tmp_path: Path) -> None:
    async def main() -> None:
        store = await BrokerStore.open(RealDisk(tmp_path), SMALL, disk_id=DISK_ID)
        logs = await store.create_many([spec(n) for n in range(1, 30)])
        await asyncio.gather(*(submit(store, log, [Writer(log).entry(1)]) for log in logs))
        assert all(log.durable_index == 1 for log in logs)
        await store.close()

    run(main())


def test_how_long_syncs_take_is_known(tmp_path: Path) -> None:
    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("journal", create=True)
        for number in range(3):
            await disk.commit([Write(file, number, (b"x",))])
        await disk.commit([Write(file, 3, (b"y",))], sync=False)
        assert disk.syncs.count == 3, "what is only written is no sync"
        taken = disk.syncs.take()
        assert len(taken) == 3
        assert all(0 < seconds < 10 for seconds in taken)
        file.close()
        await disk.close()

    asyncio.run(main())


class Clock:
    """A perf_counter by which each commit takes ``seconds``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


async def lanes(disk: RealDisk, file: DiskFile, sizes: list[int]) -> list[str]:
    """On which thread each of these commits was carried out, begun one after another without a pause."""
    loop = asyncio.get_running_loop()
    here = threading.current_thread()
    found: list[str] = []
    ends = [loop.create_future() for _ in sizes]

    def done(number: int, error: BaseException | None) -> None:
        assert error is None
        assert threading.current_thread() is here, "told on the loop"
        ends[number].set_result(None)

    for number, size in enumerate(sizes):
        disk.begin_commit([Write(file, 0, [bytes(size)])], partial(done, number))
        found.append("loop" if ends[number].done() else "thread")
    await asyncio.gather(*ends)
    return found


def test_a_small_commit_is_done_at_once_and_a_large_one_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_disk.time, "perf_counter", Clock())

    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a", create=True)
        assert await lanes(disk, file, [400, 400]) == ["loop", "loop"]
        # in order: a small one does not overtake a large one
        assert await lanes(disk, file, [1 << 20, 400]) == ["thread", "thread"]
        assert await lanes(disk, file, [400]) == ["loop"]
        file.close()
        await disk.close()

    run(main())


def test_while_the_device_is_slow_the_loop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(real_disk.time, "perf_counter", clock)

    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a", create=True)
        clock.seconds = 0.1
        assert await lanes(disk, file, [400]) == ["loop"], "nothing is known yet"
        assert await lanes(disk, file, [400]) == ["thread"]
        clock.seconds = 0.0001
        found = [(await lanes(disk, file, [400]))[0] for _ in range(60)]
        assert found[0] == "thread", "one quick commit is no quick device"
        assert found[-1] == "loop"
        file.close()
        await disk.close()

    run(main())


def test_a_sync_that_fails_on_the_loop_is_told_as_one_in_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    async def main() -> None:
        disk = RealDisk(tmp_path)
        file = await disk.open("a", create=True)
        told: list[BaseException | None] = []
        with monkeypatch.context() as patch:
            patch.setattr(real_disk.os, "fdatasync", broken)
            disk.begin_commit([Write(file, 0, [b"x"])], told.append)
        assert [type(error) for error in told] == [StorageFailed]
        file.close()
        await disk.close()

    run(main())
