"""Assignors: everything is assigned once, balanced, and moves are as few as a search of all choices finds."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftlog.broker.assignors import ASSIGNORS, sticky, uniform
from raftlog.state.groups import Assignment, Key, assignment_of, keys_of

Members = dict[str, tuple[str, ...]]
Topics = dict[str, tuple[bytes, int]]
Owners = dict[Key, str]


def topic_id(name: str) -> bytes:
    return name.encode() * 16


def topics_of(counts: Mapping[str, int]) -> Topics:
    return {name: (topic_id(name), count) for name, count in counts.items()}


def owners_of(held: Mapping[str, Assignment]) -> Owners:
    owners: Owners = {}
    for name, assignment in held.items():
        for key in keys_of(assignment):
            assert key not in owners, f"{key} is given to {owners[key]} and to {name}"
            owners[key] = name
    return owners


def held_by(owners: Owners) -> dict[str, Assignment]:
    return {
        name: assignment_of(key for key, owner in owners.items() if owner == name)
        for name in set(owners.values())
    }


def readers_of(members: Members, topics: Topics) -> dict[Key, list[str]]:
    """Each partition that anybody subscribes to, and who may have it."""
    return {
        (found, partition): readers
        for name, (found, count) in topics.items()
        for partition in range(count)
        if (readers := sorted(member for member, wants in members.items() if name in wants))
    }


def loads_of(members: Members, owners: Owners) -> dict[str, int]:
    return {name: sum(owner == name for owner in owners.values()) for name in members}


def moves_between(before: Owners, after: Owners, readers: dict[Key, list[str]]) -> int:
    """How many partitions changed from one member that may have them to another."""
    return sum(
        before[key] != owner for key, owner in after.items() if key in before and before[key] in readers[key]
    )


def run(
    assignor: Callable[..., dict[str, Assignment]], members: Members, topics: Topics, before: Owners
) -> Owners:
    """The assignment, checked for what every rule promises."""
    found = assignor(members, topics, held_by(before))
    assert found.keys() == members.keys()
    owners = owners_of(found)
    readers = readers_of(members, topics)
    assert owners.keys() == readers.keys(), "exactly what somebody subscribes to is assigned"
    assert all(owner in readers[key] for key, owner in owners.items())
    assert all(assignment == assignment_of(keys_of(assignment)) for assignment in found.values())
    shuffled = dict(reversed(members.items()))
    again = assignor(shuffled, dict(reversed(topics.items())), held_by(dict(reversed(before.items()))))
    assert again == found, "the order of the input does not matter"
    return owners


@st.composite
def cases(draw: st.DrawFn, members_max: int = 4, partitions_max: int = 3) -> tuple[Members, Topics, Owners]:
    """Members "a" to "d", who subscribe as they like, topics x to z, and what was held: by them or by members
    who are gone, of topics that may be gone."""
    topics = topics_of(
        draw(st.dictionaries(st.sampled_from("xyz"), st.integers(1, partitions_max), min_size=1))
    )
    wants = st.sets(st.sampled_from("xyz")).map(sorted).map(tuple)
    names = st.sampled_from("abcd"[:members_max])
    members = draw(st.dictionaries(names, wants, min_size=1, max_size=members_max))
    keys = [(topic_id(name), partition) for name in "xyz" for partition in range(partitions_max + 1)]
    before = draw(st.dictionaries(st.sampled_from(keys), st.sampled_from("abcdgone"[:5]), max_size=9))
    return members, topics, before


def search(readers: dict[Key, list[str]], members: Members, before: Owners) -> tuple[int, int]:
    """Least sum of squared loads, and with that the least moves, of all assignments there are."""
    best: tuple[int, int] | None = None
    for choice in itertools.product(*readers.values()):
        after = dict(zip(readers, choice, strict=True))
        squares = sum(load * load for load in loads_of(members, after).values())
        if best is None or squares <= best[0]:
            found = squares, moves_between(before, after, readers)
            best = found if best is None else min(best, found)
    assert best is not None
    return best


@settings(deadline=None, max_examples=250)
@given(cases(members_max=3))
def test_uniform_is_as_balanced_and_moves_as_little_as_any_assignment(
    case: tuple[Members, Topics, Owners],
) -> None:
    members, topics, before = case
    readers = readers_of(members, topics)
    after = run(uniform, members, topics, before)
    squares = sum(load * load for load in loads_of(members, after).values())
    assert (squares, moves_between(before, after, readers)) == search(readers, members, before)
    assert run(uniform, members, topics, after) == after, "nothing changed, nothing moves"


def test_uniform_sends_home_what_an_earlier_step_moved_too_far() -> None:
    members: Members = {"a": ("x",), "b": ("w", "x", "z"), "c": ("y", "z"), "d": ("w", "x", "z"), "e": ("y",)}
    topics = topics_of({"w": 2, "x": 1, "y": 3, "z": 3})
    held = {"w0": "b", "y0": "c", "y1": "c", "y2": "e", "z0": "b", "z1": "b", "z2": "c"}
    before = {(topic_id(name[0]), int(name[1])): owner for name, owner in held.items()}
    readers = readers_of(members, topics)
    after = run(uniform, members, topics, before)
    squares = sum(load * load for load in loads_of(members, after).values())
    assert (squares, moves_between(before, after, readers)) == search(readers, members, before) == (17, 2)


def test_uniform_moves_along_a_chain_where_no_direct_move_helps() -> None:
    # a reads x, b reads x and y, c reads y: what is too much at a reaches c only by way of b
    members: Members = {"a": ("x",), "b": ("x", "y"), "c": ("y",)}
    topics = topics_of({"x": 4, "y": 2})
    x, y = topic_id("x"), topic_id("y")
    before = {(x, 0): "a", (x, 1): "a", (x, 2): "a", (x, 3): "b", (y, 0): "b", (y, 1): "c"}
    after = run(uniform, members, topics, before)
    assert loads_of(members, after) == {"a": 2, "b": 2, "c": 2}
    assert moves_between(before, after, readers_of(members, topics)) == 2


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 12),
    st.dictionaries(st.sampled_from("xyz"), st.integers(1, 20), min_size=1),
    st.integers(0, 12),
    st.randoms(use_true_random=False),
)
def test_with_equal_subscriptions_loads_differ_by_one_and_moves_are_what_balance_takes(
    count: int, counts: dict[str, int], before_count: int, rng: random.Random
) -> None:
    topics = topics_of(counts)
    wants = tuple(sorted(counts))
    members: Members = {f"m{number}": wants for number in range(count)}
    keys = [(found, partition) for found, each in topics.values() for partition in range(each)]
    before = {key: f"m{rng.randrange(before_count)}" for key in keys} if before_count else {}
    after = run(uniform, members, topics, before)
    loads = sorted(loads_of(members, after).values())
    assert loads[-1] - loads[0] <= 1
    # each member keeps what fits its share; the bigger shares go to those that had most
    share, bigger = divmod(len(keys), count)
    had = sorted((sum(owner == name for owner in before.values()) for name in members), reverse=True)
    kept = sum(min(load, share + (rank < bigger)) for rank, load in enumerate(had))
    owned = sum(owner in members for owner in before.values())
    assert moves_between(before, after, readers_of(members, topics)) == owned - kept


@settings(deadline=None)
@given(cases())
def test_sticky_moves_only_what_gives_an_empty_member_its_one(case: tuple[Members, Topics, Owners]) -> None:
    members, topics, before = case
    readers = readers_of(members, topics)
    after = run(sticky, members, topics, before)
    loads = loads_of(members, after)
    for key, owner in after.items():
        if key in before and before[key] in readers[key] and before[key] != owner:
            assert loads[owner] == 1, f"{owner} was not empty, and yet it took {key} away"
    for name, load in loads.items():
        if load == 0:
            rich = [key for key, owner in after.items() if loads[owner] > 1 and name in readers[key]]
            assert not rich, f"{name} has nothing, and could have one of {rich}"
    assert run(sticky, members, topics, after) == after


def test_sticky_leaves_alone_what_uniform_would_move() -> None:
    members: Members = {"a": ("x",), "b": ("x",)}
    topics = topics_of({"x": 6})
    before = {(topic_id("x"), partition): "a" if partition else "b" for partition in range(6)}
    assert run(sticky, members, topics, before) == before
    assert loads_of(members, run(uniform, members, topics, before)) == {"a": 3, "b": 3}


# -- size ----------------------------------------------------------------------------------------------------


def big(equal: bool) -> tuple[Members, Topics]:
    """50 members, 500 partitions of 10 topics."""
    rng = random.Random(1)
    topics = topics_of(dict.fromkeys("abcdefghij", 50))
    wants = [
        tuple(topics) if equal else tuple(sorted(rng.sample("abcdefghij", rng.randint(1, 6))))
        for _ in range(50)
    ]
    return {f"m{number:02}": wants[number] for number in range(50)}, topics


def improving_path(members: Members, owners: Owners, readers: dict[Key, list[str]]) -> str | None:
    """Whether partitions could be passed on from one member to one that has two less: then the sum of
    squares is not least (Harvey, Ladner, Lovász, Tamir 2003, theorem 3.1)."""
    loads = loads_of(members, owners)
    gives: dict[str, set[str]] = {name: set() for name in members}
    for key, owner in owners.items():
        gives[owner].update(readers[key])
    for start in members:
        seen, queue = {start}, deque([start])
        while queue:
            for taker in gives[queue.popleft()] - seen:
                if loads[taker] <= loads[start] - 2:
                    return f"{start} could give one to {taker}"
                seen.add(taker)
                queue.append(taker)
    return None


@pytest.mark.parametrize("equal", [True, False], ids=["equal subscriptions", "unequal subscriptions"])
@pytest.mark.parametrize("name", ASSIGNORS)
def test_50_members_and_500_partitions(name: str, equal: bool) -> None:
    members, topics = big(equal)
    assignor = ASSIGNORS[name]
    rng = random.Random(2)
    readers = readers_of(members, topics)
    from_scratch = run(assignor, members, topics, {})
    fewer = {member: wants for member, wants in members.items() if member != "m07"}
    more: Members = {**members, "new": tuple(topics)}
    befores: dict[str, tuple[Members, Owners]] = {
        "first": (members, {}),
        "leave": (fewer, from_scratch),
        "join": (more, from_scratch),
        "one has it all": (members, {key: readers[key][0] for key in readers}),
        "anything": (members, {key: rng.choice(sorted(members)) for key in readers}),
    }
    for case, (now, before) in befores.items():
        after = run(assignor, now, topics, before)
        if name == "uniform":
            assert improving_path(now, after, readers_of(now, topics)) is None
        held = held_by(before)
        taken = []
        for _ in range(5):
            began = time.process_time()
            assignor(now, topics, held)
            taken.append(time.process_time() - began)
        assert min(taken) < 0.020, f"{case}: {min(taken) * 1000:.1f} ms"
    if name == "uniform" and equal:
        joined = run(assignor, more, topics, from_scratch)
        assert moves_between(from_scratch, joined, readers_of(more, topics)) == 9, "its share: 500 / 51"
        left = run(assignor, fewer, topics, from_scratch)
        assert moves_between(from_scratch, left, readers_of(fewer, topics)) == 0, (
            "only what m07 had is handed out"
        )
