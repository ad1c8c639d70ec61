"""The way in: rate limits, then a place among the requests in flight."""

import time
from collections.abc import Iterator
from itertools import chain

from services.global_proxy.admission.kv_budget import KvBudget
from services.global_proxy.admission.queue import AdmissionQueue, QueueSettings
from services.global_proxy.admission.rate_limit import RateLimiter
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.membership.load_table import LoadTable, Writer
from services.global_proxy.policies.base import Prompt
from services.global_proxy.security.api_keys import ApiKey

_LOOK_AT_REPORTS_S = 0.5
_KEEP_FED = 1.25  # of what D runs at once: P's work and D's next request overlap with D's present ones


class Admitted:
    """A request's place. `leave` it, however the request ends."""

    __slots__ = ("_arrived", "_entered_s", "_gate", "_reserved")

    def __init__(self, gate: "Gate", reserved: int) -> None:
        self._gate = gate
        self._reserved = reserved
        self._arrived = False
        self._entered_s = time.monotonic()

    def arrived(self) -> None:
        """D has answered, so its own reports count this request's KV."""
        self._arrived = True
        self._gate.queue.arrived(self._reserved)

    def ended_well(self, num_new_tokens: int | None, max_new_tokens: int) -> None:
        """The answer was complete. Of whole answers the number of tokens is not known: None."""
        self._gate.queue.ended_well(time.monotonic() - self._entered_s, num_new_tokens, max_new_tokens)

    def leave(self) -> None:
        self._gate.queue.leave(self._reserved, self._arrived)
        self._gate.writer.add_in_flight(-1)


class Gate:
    """One worker's.

    Args:
        answering: the pools whose instances answer: of D and of plain engines.
        max_active: requests in flight that each of these is to be given; all of them together are the limit.
    """

    def __init__(
        self,
        answering: tuple[Pool, ...],
        table: LoadTable,
        writer: Writer,
        settings: QueueSettings,
        max_active: int,
    ) -> None:
        self.writer = writer
        self._answering = answering
        self._table = table
        self._max_active = max_active
        self._kv = KvBudget()
        self._looked_s = float("-inf")
        self._limiter = RateLimiter(writer.buckets)
        elsewhere = self._elsewhere if table.num_workers > 1 else None
        self.queue = AdmissionQueue(max_active, self._kv, settings, elsewhere)

    def charge(self, key: ApiKey | None, prompt: Prompt) -> None:
        """Count the request against its key's rates. Raises RateLimitError."""
        if key is not None:
            self._limiter.take(key.name.encode(), key.limits, prompt.num_tokens + prompt.max_new_tokens)

    def give_back(self, key: ApiKey | None, num_tokens: int) -> None:
        """Tokens that were charged and not generated."""
        if key is not None and num_tokens > 0:
            self._limiter.give_back(key.name.encode(), num_tokens)

    def try_enter(self, prompt: Prompt) -> Admitted | None:
        """A place, if there is one at once."""
        if time.monotonic() - self._looked_s >= _LOOK_AT_REPORTS_S:
            self._look_at_instances()
        reserved = self.queue.try_enter(prompt)
        return self._admit(reserved) if reserved else None

    async def enter(self, prompt: Prompt, key: ApiKey | None, priority: int, deadline_s: float) -> Admitted:
        """Wait for a place. A client may put itself behind others, its key alone before them.

        Raises:
            NotAdmittedError: there is none in time.
        """
        of_key = key.priority if key is not None else 0
        self.writer.add_queued(1)
        try:
            reserved = await self.queue.enter(prompt, of_key + max(priority, 0), deadline_s)
        finally:
            self.writer.add_queued(-1)
        return self._admit(reserved)

    def look(self) -> None:
        """Instances have come or gone."""
        self._look_at_instances()
        self.queue.look()

    def _admit(self, reserved: int) -> Admitted:
        self.writer.add_in_flight(1)
        return Admitted(self, reserved)

    def _look_at_instances(self) -> None:
        self._looked_s = time.monotonic()
        serving = [instance for instance in self._instances() if instance.member.state == "active"]
        self.queue.max_in_flight = max(1, int(len(serving) * self._max_active * _KEEP_FED))
        reports = [self._table.report(instance.slot) for instance in serving]
        known = [report for report in reports if report is not None and report.kv_total_tokens]
        if known and len(known) == len(serving):
            capacity = sum(report.kv_total_tokens for report in known)
            self._kv.report(capacity, sum(report.kv_used_tokens for report in known))
        else:
            self._kv.report(None, 0)

    def _instances(self) -> Iterator[Instance]:
        return chain.from_iterable(pool.instances for pool in self._answering)

    def _elsewhere(self) -> tuple[int, int]:
        """Requests in flight in other workers, and the tokens that these have where answers are made."""
        num_in_flight = self._table.num_in_flight() - self.queue.num_in_flight
        tokens = sum(instance.num_tokens for instance in self._instances())
        return max(num_in_flight, 0), max(tokens - self._kv.reserved_tokens, 0)
