"""One broker in a process of its own: ``python netns_broker.py DIRECTORY HOST PORT``. Ends with its stdin."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from raftlog.broker.broker import Broker, BrokerPlace
from raftlog.net.network import real_seams
from raftlog.storage.real_disk import RealDisk


async def main(directory: Path, host: str, port: int) -> None:
    place = BrokerPlace(host=host, port=port, node_id=directory.name)
    broker = await Broker.start(real_seams(), RealDisk(directory), place=place)
    await broker.ready()
    print("runs", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await broker.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
