"""A driver that lives on while its whole Ray cluster is killed and another one takes over; run by
``test_head_loss.py``, which tells it line by line what it has done.

    python head_loss_driver.py ADDRESS
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from types import TracebackType

import raftlog
from raftlog.errors import RaftlogError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray

COUNT = 600
COPIED = 200


def tell(line: str) -> None:
    print(line, flush=True)


def told(line: str) -> str:
    """Wait until the test says that; returns what comes behind it."""
    said = sys.stdin.readline()
    assert said.startswith(line), said
    return said.removeprefix(line).strip()


def attach(address: str) -> raftlog.Log:
    ray.init(address=address, namespace="raftlog", log_to_driver=False, logging_level="ERROR")
    return raftlog.connect("default")


def copy(log: raftlog.Log, count: int) -> int:
    """Move that many records on, exactly once; returns how many of them there were."""
    moved = 0
    with (
        log.consumer("orders", group="copy") as consumer,
        log.producer(transactional_id="copy") as producer,
    ):
        while moved < count and (records := consumer.poll(timeout=5.0, max_records=min(50, count - moved))):
            with producer.transaction() as txn:
                for record in records:
                    txn.send("copies", record.value)
                txn.send_offsets(consumer)
            moved += len(records)
    return moved


def values(log: raftlog.Log, topic: str, count: int = 0) -> list[bytes | None]:
    """All of a topic, once that is so much: markers of transactions come a moment after the commit."""
    deadline = time.monotonic() + 30
    while True:
        with log.consumer(topic) as consumer:
            found = [record.value for record in consumer.records(until="end")]
        if len(found) >= count or time.monotonic() > deadline:
            return found


def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what went wrong, and end at once, whatever threads there still are."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def main(address: str) -> None:
    log = attach(address)
    log.create_topic("orders", partitions=3)
    log.create_topic("copies", partitions=2)
    producer = log.producer(delivery_timeout_ms=5000)
    numbers = [b"%d" % number for number in range(COUNT)]
    producer.send_batch("orders", numbers).result(60)
    with log.consumer("orders", group="billing") as consumer:
        handed = 0
        while handed < COPIED:
            handed += len(consumer.poll(timeout=10.0, max_records=COPIED - handed))
        consumer.commit()
    assert copy(log, COPIED) == COPIED
    left_open = log.producer(transactional_id="left-open")
    transaction = left_open.transaction().__enter__()
    for number in range(10):
        transaction.send("copies", b"late %d" % number).result(30)
    tell("ready")

    told("killed")
    try:
        producer.send("orders", b"into the void").result(30)
        tell("delivered")
    except RaftlogError as error:
        tell(f"refused {type(error).__name__}")

    ray.shutdown()
    log = attach(told("address"))
    # Handles from before go on with the brokers that have come back.
    producer.send("orders", b"again").result(60)
    late = [b"late %d" % number for number in range(11)]
    try:
        transaction.send("copies", late[10]).result(30)
        transaction.__exit__(None, None, None)
        tell("committed")
    except RaftlogError as error:
        tell(f"aborted {type(error).__name__}")
        late = []
    with log.producer(transactional_id="left-open") as after, after.transaction() as txn:
        txn.send("copies", b"after")
    orders = values(log, "orders")
    assert sorted(set(orders) - {b"into the void"}) == sorted([*numbers, b"again"]), "lost"
    assert len(orders) == len(set(orders)), "doubled"
    with log.consumer("orders", group="billing") as consumer:
        rest = list(consumer.records(until="end"))
    assert len(rest) == len(orders) - COPIED, "the group goes on from its position"
    assert copy(log, COUNT) == len(orders) - COPIED
    expected = [*orders, *late, b"after"]
    copies = values(log, "copies", len(expected))
    assert sorted(copies) == sorted(expected), (
        f"not once each, or half of what was left open: {set(copies) ^ set(expected)}"
    )
    with log.producer() as anew:
        anew.send("orders", b"more").result(30)
    tell("done")


if __name__ == "__main__":
    sys.excepthook = end
    main(sys.argv[1])
