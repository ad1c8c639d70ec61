"""What bounds a request: its deadline, its client's patience, and the proxy's own end."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from services.global_proxy.errors import ClientGoneError, DeadlineError, DrainingError, RequestEndedError

Receive = Callable[[], Awaitable[Any]]


class RequestScope:
    """`async with RequestScope(...) as scope:` cancels its block when the first of the three ends it.

    Raises:
        DeadlineError: `timeout_s` passed.
        ClientGoneError: the client hung up, after `watch_client`.
        RequestEndedError: whatever `end` was given.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._why: RequestEndedError = DeadlineError(f"The request took longer than {timeout_s:g} s")
        self._watcher: asyncio.Task[None] | None = None
        self._open = False

    def end(self, why: RequestEndedError) -> None:
        """Cancel the block, which then raises `why`. The first reason wins; outside the block nothing happens."""
        if self._open and not self._timeout.expired():
            self._why = why
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def watch_client(self, receive: Receive, is_answered: Callable[[], bool]) -> None:
        """From here on end when the client hangs up. The body must have been read: this takes every message.

        ASGI sends http.disconnect after a complete answer too; `is_answered` tells the two apart.
        """
        self._watcher = asyncio.create_task(self._end_with_client(receive, is_answered))

    async def _end_with_client(self, receive: Receive, is_answered: Callable[[], bool]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not is_answered():
            self.end(ClientGoneError())

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self._why from None


class InFlight:
    """The scopes now open, so that a stopping proxy can wait for them and, at last, end them."""

    def __init__(self) -> None:
        self.draining = False
        self._scopes: set[RequestScope] = set()
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._scopes)

    def add(self, scope: RequestScope) -> None:
        """Raises DrainingError when no more are taken."""
        if self.draining:
            raise DrainingError("The proxy is stopping: send the request again, to another one")
        self._scopes.add(scope)

    def remove(self, scope: RequestScope) -> None:
        self._scopes.discard(scope)
        if not self._scopes:
            self._empty.set()

    async def drain(self, limit_s: float) -> None:
        """Take no more; wait `limit_s` seconds for the rest, then end them."""
        self.draining = True
        if await self._wait_until_empty(limit_s):
            return
        for scope in tuple(self._scopes):
            scope.end(DrainingError(f"The proxy stopped before the answer was complete ({limit_s:g} s)"))
        await self._wait_until_empty(2.0)  # a client that reads nothing can hold up its last event for a second

    async def _wait_until_empty(self, limit_s: float) -> bool:
        if not self._scopes:
            return True
        self._empty.clear()
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
