"""What bounds a request: its deadline, its client's patience, and the proxy's own end."""

import asyncio
import time

from services.global_proxy.errors import DeadlineError, DrainingError, RequestEndedError


class RequestScope:
    """Whatever ends the request cancels the task that serves it.

    Attributes:
        deadline_s: on the monotonic clock, which is the event loop's.
        why: what ended it, when the task is cancelled.
    """

    __slots__ = ("_open", "_task", "deadline_s", "why")

    def __init__(self, task: asyncio.Task[None], deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.why: RequestEndedError | None = None
        self._task = task
        self._open = True

    def end(self, why: RequestEndedError) -> None:
        """Cancel the task. The first reason wins; after `close` nothing happens."""
        if self._open and self.why is None:
            self.why = why
            self._task.cancel()

    def close(self) -> None:
        """The request is over."""
        self._open = False


class InFlight:
    """The scopes now open, all with the same time to live: ended when that is over, or when the proxy stops.

    One timer watches the oldest, so that a request costs none. Make it in the event loop.
    """

    def __init__(self, timeout_s: float) -> None:
        self.draining = False
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._scopes: dict[RequestScope, None] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._scopes)

    def open(self, task: asyncio.Task[None], started_s: float) -> RequestScope:
        """A new request's scope; `close` it."""
        scope = RequestScope(task, started_s + self._timeout_s)
        self._scopes[scope] = None
        if self._timer is None:
            self._timer = self._loop.call_at(scope.deadline_s, self._end_the_oldest)
        return scope

    def close(self, scope: RequestScope) -> None:
        scope.close()
        del self._scopes[scope]
        if not self._scopes:
            self._empty.set()

    def admit(self) -> None:
        """Raises DrainingError when no more are taken."""
        if self.draining:
            raise DrainingError("The proxy is stopping: send the request again, to another one")

    async def drain(self, limit_s: float) -> None:
        """Take no more; wait `limit_s` seconds for the rest, then end them."""
        self.draining = True
        if not await self._wait_until_empty(limit_s):
            for scope in tuple(self._scopes):
                scope.end(DrainingError(f"The proxy stopped before the answer was complete ({limit_s:g} s)"))
            await self._wait_until_empty(2.0)
        if self._timer is not None:
            self._timer.cancel()

    def _end_the_oldest(self) -> None:
        self._timer = None
        now_s = time.monotonic()
        for scope in tuple(self._scopes):
            if scope.deadline_s > now_s:
                self._timer = self._loop.call_at(scope.deadline_s, self._end_the_oldest)
                return
            scope.end(DeadlineError(f"The request took longer than {self._timeout_s:g} s"))

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
