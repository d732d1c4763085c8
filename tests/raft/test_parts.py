"""The parts of the core: single cases. ``test_machines`` holds them against plain models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from raft_cluster import MemoryDisk, chain

from raftlog.errors import ConfigError, CorruptFrame
from raftlog.raft.config import RaftConfig, RecoveredLog
from raftlog.raft.confstack import ConfStack, encode_conf
from raftlog.raft.log import UNKNOWN_CRC, LogDiverged, RaftLog
from raftlog.raft.progress import Progress, ProgressState
from raftlog.raft.quorum import VoteResult, vote_result
from raftlog.raft.types import ConfState, Entry, HardState
from raftlog.record.frame import FrameKind

CONF = ConfState((1, 2, 3))


# -- quorum --------------------------------------------------------------------------------------------------


def test_votes_of_strangers_do_not_count() -> None:
    assert vote_result(CONF, {1: True, 8: True, 9: True}) is VoteResult.PENDING


# -- entries -------------------------------------------------------------------------------------------------


def test_an_entry_is_parsed_from_where_its_frame_begins() -> None:
    first, second = chain([1, 2])
    buffer = bytes(first.frame) + bytes(second.frame)
    found = Entry.parse(buffer, len(first.frame))
    assert found == second
    assert (found.index, found.term, found.prev_crc) == (2, 2, first.crc)
    assert bytes(found.payload) == bytes(second.payload)
    with pytest.raises(CorruptFrame):
        Entry.parse(buffer[:-1] + b"!", len(first.frame))


# -- log -----------------------------------------------------------------------------------------------------


def log_of(terms: list[int], *, applied: int = 0, commit: int = 0, keep: int = 99) -> RaftLog:
    disk = MemoryDisk(CONF, HardState(max([0, *terms]), 0, commit), chain(terms))
    return RaftLog(disk.recovered(applied, keep))


def test_batch_respects_the_limit_but_gives_at_least_one() -> None:
    log = log_of([1] * 5)
    size = chain([1])[0].size
    for limit, count in ((0, 1), (size, 1), (2 * size, 2), (2 * size + 1, 2), (99 * size, 4)):
        entries, total = log.batch(2, limit)
        assert len(entries) == count
        assert total == count * size


def test_slices_outside_memory_are_none() -> None:
    log = log_of([1] * 5, applied=3, commit=3, keep=0)
    assert log.offset == 4
    assert log.slice(3, 5) is None
    assert log.slice(4, 7) is None
    assert [entry.index for entry in log.slice(4, 6) or ()] == [4, 5]


def test_what_is_compacted_may_have_left_memory_long_before() -> None:
    entries = chain([1, 2, 2, 3])
    log = log_of([1, 2, 2, 3], applied=4, commit=4)
    log.trim(entries[0].size, 4)
    assert log.offset == 4
    assert [log.crc(index) for index in range(5)] == [
        0,
        UNKNOWN_CRC,
        UNKNOWN_CRC,
        entries[2].crc,
        entries[3].crc,
    ]
    for first in (3, 4, 5):
        log.compact(first, entries[first - 2].crc)
        log.check()
        assert (log.first_index, log.offset) == (first, max(first, 4))
        assert log.crc(first - 1) == entries[first - 2].crc
        assert log.term(first - 1) == entries[first - 2].term
    assert log.term(2) is None
    assert log.meeting_point(4, 1) == 4


def test_leader_time_survives_a_cut_down_to_trimmed_entries() -> None:
    log = log_of([1, 1, 1], applied=2, commit=2)
    log.trim(0, 3)
    assert log.offset == 3
    log.cut(3)
    assert log.last_leader_time_ms == 1002
    assert log.last_crc == chain([1, 1])[-1].crc


def test_a_log_whose_tail_is_all_on_disk_needs_the_last_crc() -> None:
    entries = chain([1, 2])
    recovered = RecoveredLog(
        HardState(2, 0, 2), ((0, CONF),), terms=((1, 1), (2, 2)), last_index=2, applied=2
    )
    with pytest.raises(AssertionError, match="crc of the last entry"):
        RaftLog(recovered)
    log = RaftLog(replace(recovered, last_crc=entries[-1].crc, last_leader_time_ms=7))
    assert (log.last_crc, log.last_leader_time_ms, log.last_term) == (entries[-1].crc, 7, 2)


def test_a_tail_that_misses_unapplied_entries_is_refused() -> None:
    recovered = MemoryDisk(CONF, HardState(1, 0, 1), chain([1, 1, 1])).recovered()
    with pytest.raises(AssertionError, match="must be in memory"):
        RaftLog(replace(recovered, tail=recovered.tail[1:]))


def test_an_entry_off_the_chain_is_refused() -> None:
    log = log_of([1])
    with pytest.raises(LogDiverged):
        log.append(chain([1], first=2, prev_crc=1))


# -- progress ------------------------------------------------------------------------------------------------


def test_progress_window_fills_and_frees() -> None:
    progress = Progress(2, 1, 0)
    progress.become_replicate()
    for last, size in ((1, 10), (3, 20), (4, 30)):
        progress.sent(last, size)
    assert progress.window_bytes(3, 100) == 0
    assert progress.window_bytes(4, 100) == 40
    assert progress.window_bytes(4, 60) == 0
    assert progress.acknowledged(3)
    assert (progress.match, progress.next, progress.inflight_bytes) == (3, 5, 30)
    assert not progress.acknowledged(2), "an old one"
    progress.check()


def test_progress_refusals() -> None:
    progress = Progress(2, 11, 0)
    assert not progress.rejected(4, 2), "not the probe that is out"
    assert progress.rejected(10, 6)
    assert progress.next == 7
    assert progress.rejected(6, 6), "must go down by at least one"
    assert progress.next == 6
    progress.acknowledged(5)
    progress.become_replicate()
    progress.sent(9, 1)
    assert not progress.rejected(5, 0)
    assert progress.rejected(9, 0)
    assert (progress.state, progress.next, progress.inflight_messages) == (ProgressState.PROBE, 6, 0)
    progress.become_snapshot()
    assert not progress.rejected(5, 0)
    assert "snapshot" in repr(progress)


# -- configurations ------------------------------------------------------------------------------------------


def conf_entry(index: int, conf: ConfState) -> Entry:
    return Entry.create(0, FrameKind.CONF, 1, index, 0, encode_conf(conf))


def test_the_stack_follows_appends_and_cuts() -> None:
    stack = ConfStack([(0, CONF)])
    four, five = ConfState((1, 2, 3, 4)), ConfState((1, 2, 3, 4, 5))
    stack.push(conf_entry(10, four))
    stack.push(conf_entry(20, five))
    assert stack.current == five
    assert [stack.at(index) for index in (0, 9, 10, 19, 20, 99)] == [CONF, CONF, four, four, five, five]
    assert list(stack.possible(5)) == [five, four, CONF]
    assert list(stack.possible(10)) == [five, four]
    assert list(stack.possible(20)) == [five]
    assert not stack.cut(21)
    assert stack.cut(20)
    assert (stack.current, stack.current_index) == (four, 10)
    stack.forget_below(9)
    assert list(stack) == [(0, CONF), (10, four)]
    stack.forget_below(10)
    assert list(stack) == [(10, four)]
    with pytest.raises(AssertionError, match="no configuration known at 9"):
        stack.at(9)
    stack.restore(50, five)
    assert list(stack) == [(50, five)]


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": 0},
        {"election_timeout_ms": 0},
        {"heartbeat_ms": 1000},
        {"inflight_messages_max": 0},
        {"rank_delay_ms": -1},
        {"cache_bytes_max": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RaftConfig(**({"id": 1} | wrong))
