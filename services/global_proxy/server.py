"""Listening: connections in, requests to the proxy, until told to stop."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Self

from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.client_connection import ClientConnection, ConnectionLimits
from services.global_proxy.http.listener import Listener
from services.global_proxy.http.request_parser import Refusal
from services.global_proxy.proxy import Proxy

_LAST_CLOSE_S = 2.0  # for answers that are still being sent


class ProxyServer:
    """`async with ProxyServer(...) as server:` listens; leaving the block drains first.

    Draining goes on listening while requests in flight finish, so that /health says 503 and /live 200 until the end.

    Args:
        is_ahead, count: see Listener; workers that share `sock` share out its connections by them.
    """

    def __init__(
        self,
        proxy: Proxy,
        sock: socket.socket,
        tls: ssl.SSLContext | None = None,
        is_ahead: Callable[[], bool] = lambda: False,
        count: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._proxy = proxy
        self._sock = sock
        self._tls = tls
        self._is_ahead = is_ahead
        self._count = count
        self._connections: set[ClientConnection] = set()
        settings = proxy.settings
        self._bodies = BodyBudget(settings.max_body_bytes_total)
        self._limits = ConnectionLimits(
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            reader_timeout_s=settings.reader_timeout_s,
        )

    async def __aenter__(self) -> Self:
        self._listener = Listener(self._sock, self._make_connection, self._tls, self._is_ahead, self._count)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()

    async def drain(self) -> None:
        """Finish what is being served, within limits, and close every connection."""
        await self._proxy.in_flight.drain(self._proxy.settings.drain_timeout_s)
        self._listener.close()
        for connection in tuple(self._connections):
            connection.drain()
        try:
            async with asyncio.timeout(_LAST_CLOSE_S):
                while self._connections:  # noqa: ASYNC110 (at most for a moment, at the very end)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            for connection in tuple(self._connections):
                connection.abort()

    def _make_connection(self) -> ClientConnection:
        proxy = self._proxy
        return ClientConnection(
            proxy.serve, self._limits, self._connections, self._count_refusal, proxy.look, self._bodies
        )

    def _count_refusal(self, refusal: Refusal) -> None:
        metrics = self._proxy.metrics
        metrics.refused.labels(refusal.reason).inc()
        metrics.requests.labels("", refusal.status).inc()
