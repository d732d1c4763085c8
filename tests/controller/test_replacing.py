"""Who takes the place of a lost broker, and what moves."""

from __future__ import annotations

from msgspec.structs import replace

from raftlog.controller.replacing import replace_broker, substitutes
from raftlog.state.image import Broker, Partition, Topic
from raftlog.state.metadata import MetadataState

TOPIC_ID = b"t" * 16


def image(brokers: int, *partitions: Partition) -> MetadataState:
    made = MetadataState()
    for broker_id in range(brokers):
        made.brokers[broker_id] = Broker(broker_id, b"%d" % broker_id, "n", "", broker_id + 1)
    topic = Topic("t", TOPIC_ID, {}, False, partitions)
    made.topics["t"] = made._topics_by_id[TOPIC_ID] = topic
    return made


def held(*replicas: tuple[int, int], leaving: tuple[tuple[int, int], ...] = ()) -> Partition:
    return Partition(replicas, leaving, ())


def test_every_replica_moves_and_keeps_its_place() -> None:
    state = image(4, held((10, 0), (11, 1)), held((12, 1), (13, 2)), held((14, 0), (15, 2)))
    moves = replace_broker(state, 7, 1, 3)
    assert [(move.controller_epoch, move.partition, move.replicas) for move in moves] == [
        (7, 0, [(0, 10), (3, 0)]),
        (7, 1, [(3, 0), (2, 13)]),
    ]


def test_where_both_should_hold_a_partition_another_one_takes_it() -> None:
    """A topic was made when the new broker had joined and the old one was not forgotten yet."""
    (move,) = replace_broker(image(4, held((10, 1), (11, 3)), held((12, 0))), 1, 1, 3)
    assert move.replicas == [(2, 0), (3, 11)], "who has least"


def test_where_all_others_hold_a_partition_nothing_moves() -> None:
    assert replace_broker(image(3, held((10, 1), (11, 2), (12, 0))), 1, 1, 2) == []


def test_who_drains_is_given_nothing() -> None:
    state = image(4, held((10, 1), (11, 3)))
    state.brokers[0] = replace(state.brokers[0], draining=True)
    (move,) = replace_broker(state, 1, 1, 3)
    assert move.replicas == [(2, 0), (3, 11)]


def test_a_replica_that_was_leaving_the_new_broker_is_taken_back() -> None:
    (move,) = replace_broker(image(4, held((10, 1), (11, 0), leaving=((12, 3),))), 1, 1, 3)
    assert move.replicas == [(3, 12), (0, 11)]


def test_the_place_goes_to_who_has_least_of_it() -> None:
    full = held((10, 0), (11, 1), (12, 2))
    assert substitutes(image(4, full, full), {0, 2, 3}) == [(1, 3)]
    assert substitutes(image(3, full), {0, 1, 2}) == []
    # It had begun to take over: what it took is what the old one does not hold any more.
    begun = held((10, 0), (13, 3), (12, 2), leaving=((11, 1),))
    assert substitutes(image(4, full, begun), {0, 2, 3}) == [(1, 3)]


def test_two_lost_brokers_get_one_each() -> None:
    full = held((10, 0), (11, 1), (12, 2))
    assert substitutes(image(5, full), {0, 3, 4}) == [(1, 3), (2, 4)]
    assert substitutes(image(3, full), {0}) == [(1, 0)], "nobody is left for the other one"
