"""An engine that does to a connection exactly what it is told."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

Act = Callable[[asyncio.StreamWriter], Awaitable[None]]

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
ERROR = b"HTTP/1.1 503 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n[]"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"9\r\ndata: a\n\n\r\n"
LAST = b"0\r\n\r\n"


def says(*parts: bytes) -> Act:
    async def act(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return act


async def dies(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def says_and_dies(*parts: bytes) -> Act:
    async def act(writer: asyncio.StreamWriter) -> None:
        await says(*parts)(writer)
        writer.close()

    return act


async def is_silent(writer: asyncio.StreamWriter) -> None:
    """As a process that is stopped: the kernel takes what comes."""


class RawEngine:
    """`async with RawEngine(act, ...)`: one act for each request; the last one again and again. For 20 s at most.

    Attributes:
        num_requests, num_connections: that came.
        gone: set when a peer hangs up.
    """

    def __init__(self, *acts: Act) -> None:
        self.acts = list(acts)
        self.num_requests = 0
        self.num_connections = 0
        self.gone = asyncio.Event()
        self.asked = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._deadline = asyncio.timeout(20)
        await self._deadline.__aenter__()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()
        await self._deadline.__aexit__(kind, error, traceback)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.num_requests += 1
                self.asked.set()
                act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
                await act(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            self._writers.discard(writer)
            writer.close()
