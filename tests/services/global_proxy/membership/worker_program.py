"""A worker for the tests: answers each connection with its pid; counts one request, of its index + 1 tokens, for ever.

How it behaves is its argument: "serve", "crash" before it serves, "silent" (never ready), "stubborn" (no SIGTERM) or
"deaf" (closes its channel).
"""

import asyncio
import os
import signal
import sys

import uvloop

from omni.process import obey_parent
from services.global_proxy.membership.registry_client import ChannelClient
from services.global_proxy.membership.worker_seat import WorkerSeat


async def run(seat: WorkerSeat, manner: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set if manner != "stubborn" else lambda: None)
    client = await ChannelClient.open(seat.channel_end)
    seat.table.writer(seat.index).add(0, 1, seat.index + 1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{os.getpid()} {client.state.version}".encode())
        writer.close()

    server = await asyncio.start_server(answer, sock=seat.listener)
    if manner != "silent":
        await client.ready()
    if manner == "deaf":
        await client.close()
        await stopping.wait()
    told = {asyncio.create_task(stopping.wait()), asyncio.create_task(client.wait_closed())}
    await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    await client.close()


if __name__ == "__main__":
    obey_parent()
    its_seat = WorkerSeat.taken()
    assert its_seat is not None
    if sys.argv[1] == "crash":
        sys.exit(3)
    uvloop.run(run(its_seat, sys.argv[1]))
