"""An engine's address, and the connections to it."""

import asyncio
import ssl
import time
from urllib.parse import urlsplit

from services.global_proxy.http.engine_connection import EngineConnection

_KEEPALIVE_S = 3.0  # vLLM closes idle connections after 5 s: let go first, or a request meets a closing socket


class NoConnectionError(ConnectionError):
    """No connection could be made in time."""


class EngineEndpoint:
    """Args: url: http://HOST:PORT or https://HOST:PORT."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "addresses have been checked"
        self.url = url
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._host_line = f"host: {parts.netloc}\r\n".encode()
        self._idle: list[EngineConnection] = []
        self._open: set[EngineConnection] = set()

    def idle_connection(self) -> EngineConnection | None:
        """One that is open and has not been idle for too long."""
        now_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now_s - connection.idle_since_s < _KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises NoConnectionError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(self._closed), self.host, self.port, ssl=self._ssl
                )
        except (OSError, TimeoutError) as error:
            raise NoConnectionError(str(error) or f"no connection within {self._connect_timeout_s:g} s") from error
        if not connection.closed:  # already
            self._open.add(connection)
        return connection

    def give_back(self, connection: EngineConnection) -> None:
        """Keep it for the next request if its answer was read to the end; else close it, which aborts the request."""
        if connection.make_ready():
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def abort_all(self) -> None:
        """Break off every request now with the engine."""
        for connection in tuple(self._open):
            connection.abort()

    def request(self, method: bytes, target: bytes, lines: bytes = b"", body: bytes = b"") -> bytes:
        """A request's bytes. `lines`: whole header lines, each with its end."""
        return b"%b %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
            method,
            target,
            self._host_line,
            lines,
            len(body),
            body,
        )

    def _closed(self, connection: EngineConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
