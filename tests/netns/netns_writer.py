"""Sends numbered records until its stdin ends, and prints what became of each: ``acknowledged NAME-N`` or
``failed NAME-N``.

    python netns_writer.py NAME CLUSTER_ID SECRET HOST:PORT…
"""

from __future__ import annotations

import contextlib
import sys
import threading

from raftlog.client.cluster import Bootstrap
from raftlog.client.log import Log
from raftlog.errors import RaftlogError

TOPIC = "t"


def main(name: str, cluster_id: str, secret: str, addresses: list[str]) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    places = [each.rsplit(":", 1) for each in addresses]
    bootstrap = Bootstrap(
        "netns", cluster_id, bytes.fromhex(secret), tuple((host, int(port)) for host, port in places)
    )
    number = 0
    with Log(bootstrap) as log:
        producer = log.producer(linger_ms=0, delivery_timeout_ms=2000)
        while not over.is_set():
            value = f"{name}-{number}"
            number += 1
            try:
                producer.send(TOPIC, value.encode()).result(10)
            except RaftlogError:
                print("failed", value, flush=True)
            else:
                print("acknowledged", value, flush=True)
        with contextlib.suppress(RaftlogError):  # said above
            producer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
