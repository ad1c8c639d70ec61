"""Active health checks: every instance is asked for /health, again and again."""

import asyncio
from collections.abc import Callable

from services.global_proxy.http.engine_connection import BrokenOffError
from services.global_proxy.http.engine_endpoint import NoConnectionError
from services.global_proxy.instances.instance import Instance

# Instead of a status.
_LATE = 0
_NOBODY_THERE = -1


class HealthCheck:
    """Checks one instance until cancelled.

    An engine whose processes wait for a core can be late without being dead, so one missed answer says nothing.

    Args:
        interval_s: between two checks.
        timeout_s: for one answer.
        num_misses: so many in a row make it unhealthy. A refused connection or another status than 200 counts as all
            of them: that is an answer.
        changed: called when the instance's health has changed.
    """

    def __init__(
        self, instance: Instance, interval_s: float, timeout_s: float, num_misses: int, changed: Callable[[], None]
    ) -> None:
        self._instance = instance
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._num_misses = num_misses
        self._changed = changed
        self._num_missed = 0
        self.checked = asyncio.Event()  # at least once, or it is over

    async def run(self) -> None:
        try:
            while True:
                self._saw(await self._ask())
                self.checked.set()
                await asyncio.sleep(self._interval_s)
        finally:
            self.checked.set()  # whoever waits for it waits in vain

    async def _ask(self) -> int:
        """The status, _LATE or _NOBODY_THERE."""
        endpoint = self._instance.endpoint
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = endpoint.idle_connection() or await endpoint.connect()
                answer = await connection.send(endpoint.request(b"GET", b"/health"))
                return answer.head.status
        except NoConnectionError as error:
            return _NOBODY_THERE if isinstance(error.__cause__, ConnectionRefusedError) else _LATE
        except (TimeoutError, BrokenOffError):
            return _LATE
        finally:
            if connection is not None:
                endpoint.give_back(connection)

    def _saw(self, status: int) -> None:
        instance = self._instance
        if status == 200:
            self._num_missed = 0
        elif status == _LATE:
            self._num_missed += 1
        else:
            self._num_missed = self._num_misses
        unhealthy = self._num_missed >= self._num_misses
        refuses = status == _NOBODY_THERE
        if unhealthy == instance.unhealthy and refuses == instance.refuses:
            return
        instance.set_unhealthy(unhealthy, refuses)
        self._changed()
