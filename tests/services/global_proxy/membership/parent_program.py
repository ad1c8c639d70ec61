"""A parent of two workers for the tests: prints their pids, and waits."""

import asyncio
import socket
import sys

import uvloop

from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.workers import Workers
from tests.services.global_proxy.membership.conftest import make_registry


async def run(program: str) -> None:
    table = LoadTable.create(num_workers=2, num_slots=4)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        workers = Workers([sys.executable, program, "serve"], listener, table, make_registry(table))
        await workers.start()
        print(*workers.pids, flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1]))
