"""The command: verdicts, exit codes, shrinking, blind spots, and that planted bugs can be planted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from raftlog.testing import mutations, run, simulate
from raftlog.testing.mutation import Mutation
from raftlog.testing.mutations import MUTATIONS, PatchFailed, check_all_apply, patched_source
from raftlog.testing.pipeline_profile import CLIENT_FAULTS
from raftlog.testing.run import Result, Verdict, run_once, shrink
from raftlog.testing.swarm import ELASTIC_FAULTS, FAULTS, Profile, draw
from raftlog.testing.workload import Workload


def rich(profile: Profile, verdict: Verdict = Verdict.GOOD, text: str = "") -> Result:
    """A result in which everything happened."""
    result = Result(profile, verdict, text)
    result.faults = Counter(dict.fromkeys((*FAULTS, *CLIENT_FAULTS, *ELASTIC_FAULTS, *simulate.REPLACED), 1))
    result.counts = Counter(dict.fromkeys(simulate.EVENTS_EXPECTED, 1))
    return result


def fake(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Profile], Result]) -> None:
    monkeypatch.setattr(simulate, "run_once", answer)
    monkeypatch.setattr(run, "run_once", answer)


@pytest.mark.parametrize(
    ("verdict", "code"),
    [(Verdict.GOOD, 0), (Verdict.CRASH, 3), (Verdict.LIVENESS, 4), (Verdict.CORRECTNESS, 5)],
)
def test_exit_codes_tell_verdicts_apart(
    verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, lambda profile: rich(profile, verdict if profile.seed == 7 else Verdict.GOOD, "why"))
    assert simulate.main(["--seed", "5", "--seeds", "4", "--no-shrink"]) == code
    said = capsys.readouterr().out
    assert ("seed 7: " in said) == bool(code)
    assert "--seed 7 --seeds 1 --trace" in said or not code


def test_the_worst_verdict_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict.LIVENESS, Verdict.CORRECTNESS, Verdict.CRASH]
    fake(monkeypatch, lambda profile: rich(profile, verdicts[profile.seed]))
    assert simulate.main(["--seeds", "3", "--no-shrink"]) == 5


@pytest.mark.parametrize("missing", ["blackout", "truncations"])
def test_what_never_happens_in_fifty_seeds_is_a_failure(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(profile: Profile) -> Result:
        result = rich(profile)
        result.faults.pop(missing, None)
        result.counts.pop(missing, None)
        return result

    fake(monkeypatch, answer)
    assert simulate.main(["--seeds", "49"]) == 0, "too few to tell"
    assert simulate.main(["--seeds", "50"]) == 6
    assert f"never happened: {missing}" in capsys.readouterr().out


def test_a_run_that_does_not_repeat_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traces: Iterator[int] = count()

    def answer(profile: Profile) -> Result:
        result = rich(profile)
        result.trace = next(traces)
        return result

    fake(monkeypatch, answer)
    assert simulate.main(["--seeds", "2"]) == 6
    assert "seed 0 did not repeat its run" in capsys.readouterr().out


def test_shrinking_leaves_only_the_faults_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def answer(profile: Profile) -> Result:
        tried.append(profile.skip)
        if profile.skip & {3, 7}:
            return rich(profile)
        return rich(profile, Verdict.CORRECTNESS, "lost write: some other value")

    fake(monkeypatch, answer)
    profile = Profile(0, fault_count=12)
    best = shrink(rich(profile, Verdict.CORRECTNESS, "lost write: a value"))
    assert set(range(12)) - best.profile.skip == {3, 7}
    assert len(tried) <= run.SHRINK_RUNS_MAX


def test_a_good_run_shows_its_trace_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main(["--seed", "5", "--trace"]) == 0
    assert "is leader in term" in capsys.readouterr().out


def test_another_failure_is_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda profile: rich(profile, Verdict.LIVENESS, "NoProgress: none"))
    best = shrink(rich(Profile(0), Verdict.CORRECTNESS, "lost write: a value"))
    assert best.profile.skip == frozenset()


def test_a_seed_means_one_profile_and_seeds_differ() -> None:
    assert draw(3) == draw(3)
    profiles = [draw(seed) for seed in range(60)]
    assert {profile.brokers for profile in profiles} == {1, 3, 4, 5}
    assert {True, False} == {profile.liveness for profile in profiles}
    assert all(any(kind in profile.weights for profile in profiles) for kind in FAULTS)


def test_a_failure_comes_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftlog.raft.leader.quorum_index", lambda _conf, match: max(match.values()))
    result = run_once(draw(0))
    assert result.verdict is Verdict.CORRECTNESS
    assert result.text.startswith("durable before told")
    head, *lines = result.events.splitlines()
    assert "broker 0" in head
    assert any("is leader in term 1" in line for line in lines)
    assert "Violation" in result.stack


def test_a_run_that_goes_round_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that never comes to its next step, and catches whatever it is told."""

    def turn(_workload: Workload) -> None:
        while True:
            with contextlib.suppress(Exception):
                while True:
                    pass

    monkeypatch.setattr(Workload, "run", turn)
    monkeypatch.setattr(run, "CPU_SECONDS_MAX", 0.2)
    result = run_once(draw(0))
    assert result.kind == (Verdict.LIVENESS, "DoesNotEnd")


def test_every_mutation_applies() -> None:
    check_all_apply()
    assert len(MUTATIONS) >= 20
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("source", ["x = 1\n", "gone = 1\ngone = 1\n"])
def test_a_mutation_that_no_longer_applies_is_an_error(source: str) -> None:
    with pytest.raises(PatchFailed, match=r"found [02] times"):
        patched_source(Mutation("m", "raftlog.errors", "gone", "x"), source)


def test_a_planted_bug_is_found_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.run_all(2, "committed when one has it") == []
    assert "correctness: durable before told" in capsys.readouterr().out


def test_a_name_that_no_planted_bug_has_is_an_error() -> None:
    with pytest.raises(PatchFailed, match="no planted bug"):
        mutations.run_all(1, "no such bug")


def test_a_planted_bug_that_is_not_found_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless = Mutation("harmless", "raftlog.raft.quorum", "return count // 2 + 1", "return 1 + count // 2")
    monkeypatch.setattr(mutations, "MUTATIONS", (harmless,))
    monkeypatch.setattr(mutations, "plant", lambda *_: {"seeds": 1, "verdict": "good", "text": ""})
    assert simulate.main(["--mutations", "--seeds", "1"]) == 7
    assert "NOT FOUND   harmless" in capsys.readouterr().out


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_the_controller_of_a_shaped_run_wants_the_brokers_there_are(mutation: Mutation) -> None:
    """Else it never rests, and the run without the bug fails too."""
    profile = mutations.shaped(mutation, draw(2))
    assert profile.policy.brokers == profile.brokers
