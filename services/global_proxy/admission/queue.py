"""Admission: requests start while there is room, wait in order while there will be, and else are refused at once.

A request beyond what the engines can do makes every other one slower and is itself too late: early refusals keep the
rate of good answers flat when the load is not.
"""

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.global_proxy.admission.errors import NotAdmittedError, OverloadedError, QueueTimeoutError
from services.global_proxy.admission.kv_budget import KvBudget, Sized

_LOOK_AGAIN_S = 0.003  # other workers do not say when they make room
_SMOOTHING = 0.05
_NOBODY_ELSE = (0, 0)

Elsewhere = Callable[[], tuple[int, int]]  # (requests in flight, tokens reserved) of the proxy's other workers


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """Raises ValueError: naming the field."""

    max_waiting: int = 1024  # requests, of this worker
    max_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: must be 0 or more, got {self.max_waiting}")
        if self.max_wait_s < 0:
            raise ValueError(f"max_wait_s: must be 0 seconds or more, got {self.max_wait_s}")


class _Waiter:
    __slots__ = ("admitted", "need", "number", "priority", "prompt")

    def __init__(self, prompt: Sized, priority: int, number: int) -> None:
        self.prompt = prompt
        self.priority = priority
        self.number = number  # in order of arrival
        self.need = 0  # once admitted
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: "_Waiter") -> bool:
        return (self.priority, self.number) < (other.priority, other.number)


class AdmissionQueue:
    """One worker's queue. Not thread-safe; used from one event loop.

    What lets a request in is a number of reserved tokens, which it hands back to `leave`:

        reserved = queue.try_enter(prompt) or await queue.enter(prompt, priority, deadline_s)
        try:     ...   queue.arrived(reserved) once D has answered
        finally: queue.leave(reserved, has_arrived)

    Attributes:
        max_in_flight: requests, over all workers; may be changed at any time, as `kv` may: call `look` afterwards.
        num_in_flight: requests of this worker that have entered and not left.
    """

    def __init__(
        self,
        max_in_flight: int,
        kv: KvBudget,
        settings: QueueSettings | None = None,
        elsewhere: Elsewhere | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.kv = kv
        self.settings = settings or QueueSettings()
        self.num_in_flight = 0
        self._elsewhere = elsewhere
        self._now_s = now_s
        self._waiting: list[_Waiter] = []  # a heap
        self._num_queued = 0  # ever
        self._service_s = 0.0  # smoothed
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def try_enter(self, prompt: Sized) -> int:
        """The tokens reserved for a request that may start now; 0 if it may not, and must `enter`."""
        if self._waiting:
            return 0
        kv = self.kv
        need = kv.need(prompt)
        if self._elsewhere is None:  # the same as below, without the calls
            num_in_flight = self.num_in_flight
            if num_in_flight and not (num_in_flight < self.max_in_flight and kv.has_room(need)):
                return 0
        elif not self._has_room(need):
            return 0
        self.num_in_flight += 1
        kv.reserve(need)
        return need

    async def enter(self, prompt: Sized, priority: int = 0, deadline_s: float = float("inf")) -> int:
        """Wait until the request may start. Lower priorities go first, and equals in order of arrival.

        Args:
            deadline_s: until when, on the clock `now_s`.

        Returns: the tokens reserved.

        Raises:
            OverloadedError: at once; it would wait for too long, or too many do.
            QueueTimeoutError: it waited for as long as it could.
        """
        if reserved := self.try_enter(prompt):
            return reserved
        longest_s = min(self.settings.max_wait_s, deadline_s - self._now_s())
        self._refuse_if_hopeless(priority, longest_s)
        self._num_queued += 1
        waiter = _Waiter(prompt, priority, self._num_queued)
        heapq.heappush(self._waiting, waiter)
        timer = asyncio.get_running_loop().call_later(longest_s, self._time_out, waiter)
        self.look()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter.need:  # let in, and the client left before it could go on
                self._give_back(waiter.need, has_arrived=False)
            self._forget(waiter)
            self.look()
            raise
        except NotAdmittedError:
            self.look()
            raise
        finally:
            timer.cancel()
        return waiter.need

    def arrived(self, reserved: int) -> None:
        """D has answered."""
        self.kv.arrived(reserved)

    def leave(self, reserved: int, has_arrived: bool) -> None:
        """A request is over, however it ended, and whether or not `arrived` was called for it."""
        self._give_back(reserved, has_arrived)
        if self._waiting:
            self.look()

    def ended_well(self, service_s: float, num_new_tokens: int | None, max_new_tokens: int) -> None:
        """Before `leave`: the answer was complete, `service_s` after it entered. Others teach nothing.

        Args:
            num_new_tokens: None where it is not known.
        """
        self._service_s += (_SMOOTHING if self._service_s else 1.0) * (service_s - self._service_s)
        if num_new_tokens is not None:
            self.kv.learn(num_new_tokens, max_new_tokens)

    def look(self) -> None:
        """Let in who may start now. To be called when limits or reports have changed."""
        waiting = self._waiting
        while waiting:
            head = waiting[0]
            if not head.admitted.done():
                need = self.kv.need(head.prompt)
                if not self._has_room(need):
                    break
                head.need = self._take(need)
                head.admitted.set_result(None)
            heapq.heappop(waiting)
        if waiting and self._elsewhere is not None and self._look_again is None:
            self._look_again = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._on_look_again)

    def expected_wait_s(self, num_ahead: int) -> float:
        """How long a request with so many others before it will wait, by Little's law; 0 until one has ended."""
        return (num_ahead + 1) * self._service_s / max(1, self.num_in_flight)

    def _has_room(self, need: int) -> bool:
        num_elsewhere, tokens_elsewhere = self._elsewhere() if self._elsewhere is not None else _NOBODY_ELSE
        num_in_flight = self.num_in_flight + num_elsewhere
        if num_in_flight == 0:
            return True  # what is larger than the whole budget must run at some time, or be refused by an engine
        return num_in_flight < self.max_in_flight and self.kv.has_room(need, tokens_elsewhere)

    def _take(self, need: int) -> int:
        self.num_in_flight += 1
        self.kv.reserve(need)
        return need

    def _give_back(self, reserved: int, has_arrived: bool) -> None:
        self.num_in_flight -= 1
        self.kv.release(reserved, has_arrived)

    def _refuse_if_hopeless(self, priority: int, longest_s: float) -> None:
        if len(self._waiting) >= self.settings.max_waiting:
            raise OverloadedError(
                "Too many requests are waiting; try again later", self.expected_wait_s(len(self._waiting))
            )
        wait_s = self.expected_wait_s(sum(waiter.priority <= priority for waiter in self._waiting))
        if wait_s > longest_s:
            raise OverloadedError("The request would have to wait for too long; try again later", wait_s - longest_s)

    def _time_out(self, waiter: _Waiter) -> None:
        if not waiter.admitted.done():
            self._forget(waiter)
            message = "The request waited for too long; try again later"
            waiter.admitted.set_exception(QueueTimeoutError(message, self.expected_wait_s(len(self._waiting))))

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            heapq.heapify(self._waiting)

    def _on_look_again(self) -> None:
        self._look_again = None
        self.look()
