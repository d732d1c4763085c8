"""A pipeline to try a deployment with: starts raftlog where it does not run, and bills orders exactly once.

    ray job submit -- python deploy/pipeline.py --data-dir ~/raftlog-data

Submit it again, also after it was killed: what is billed already is not billed again.
"""

from __future__ import annotations

import argparse
import json

import raftlog
from raftlog.client.log import Log


def to_invoice(record: raftlog.Record) -> bytes:
    """An order with its tax."""
    order = json.loads(record.value or b"{}")
    return json.dumps({**order, "due": round(order["amount"] * 1.19, 2)}).encode()


def produce(log: Log, orders: int) -> None:
    """Write so many orders; all of them are acknowledged when this returns."""
    with log.producer() as producer:
        for number in range(orders):
            order = json.dumps({"id": number, "amount": number % 100})
            producer.send("orders", order.encode(), key=b"customer-%d" % (number % 10))


def count(log: Log, topic: str) -> int:
    """How many committed records a topic has."""
    with log.consumer(topic) as consumer:
        return sum(1 for _ in consumer.records(until="end"))


def main() -> None:
    """Start, produce, process, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", default="default", help="name of the raftlog cluster")
    parser.add_argument("--data-dir", help="of the brokers, on every node; as in `raftlog start`")
    parser.add_argument("--orders", type=int, default=1000, help="how many to write (1000)")
    parser.add_argument("--workers", type=int, default=2, help="Ray actors that process (2)")
    arguments = parser.parse_args()
    log = raftlog.start(arguments.cluster, data_dir=arguments.data_dir)
    for topic in ("orders", "invoices"):
        log.create_topic(topic, partitions=6, exist_ok=True)
    produce(log, arguments.orders)
    done = log.process(
        "orders", "invoices", group="billing", fn=to_invoice, workers=arguments.workers, until="end"
    ).wait()
    orders, invoices = count(log, "orders"), count(log, "invoices")
    print(f"{done.records_in} orders billed now; {orders} orders, {invoices} invoices")
    log.close()


if __name__ == "__main__":
    main()
