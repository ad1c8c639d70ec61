"""The simplest balancer, where nginx is not installed: each request to the next server, answers passed on as they come.

`python -m benchmarks.bench_serving.round_robin PORT URL…`
"""

import asyncio
import itertools
import sys
from collections.abc import Sequence

import aiohttp
from aiohttp import web

_PASSED_ON = ("content-type", "x-request-id")


async def serve(port: int, urls: Sequence[str]) -> None:
    """Until cancelled."""
    turns = itertools.cycle(urls)
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30), connector=aiohttp.TCPConnector(limit=0)
    )

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        async with session.request(request.method, next(turns) + request.path_qs, data=body, headers=headers) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"content-type": answer.headers["content-type"]}
            )
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=2**26)
    app.router.add_get("/health", health)
    app.router.add_route("*", "/{path:.*}", relay)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)  # who leaves is not answered
    async with session:
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            await asyncio.get_running_loop().create_future()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2:]))
