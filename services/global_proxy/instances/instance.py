"""One engine's api server, as this worker process sees it."""

import logging
from collections.abc import Callable

from services.global_proxy.http.engine_endpoint import EngineEndpoint
from services.global_proxy.instances.ejection import Ejection
from services.global_proxy.membership.load_table import LoadTable, Writer
from services.global_proxy.membership.member import Member, Role
from services.global_proxy.observing.instance_metrics import InstanceMetrics
from services.global_proxy.policies.cost_model import Costs

_COSTS_EVERY_S = 0.02

logger = logging.getLogger(__name__)


class Instance:
    """A policy's candidate, with its load over all workers.

    Attributes:
        unhealthy: it fails its health checks: nothing is sent there, but as a last resort if it `refuses`.
        refuses: the last check found nobody there. To ask costs nothing, and it may have come up since.
        num_probes: requests now on their way to it while it is half open.
        num_excused: failures still to come from requests that it had when it was ejected: `take_excuse`.
        ejected: called when it is ejected.
    """

    def __init__(
        self, member: Member, table: LoadTable, writer: Writer, metrics: InstanceMetrics, connect_timeout_s: float
    ) -> None:
        self.member = member
        self.name = member.name
        self.role: Role = member.spec.role
        self.slot = member.slot
        self.endpoint = EngineEndpoint(member.spec.url, connect_timeout_s)
        self.costs = Costs()
        self.unhealthy = False
        self.refuses = False
        self.num_probes = 0
        self.num_excused = 0
        self.ejected: Callable[[], None] = lambda: None
        self._num_own_requests = 0  # of this worker
        self._costs_due_s = 0.0
        self._ejection = Ejection()
        self._table = table
        self._writer = writer
        self._metrics = metrics

    @property
    def num_requests(self) -> int:
        return self._table.requests(self.slot)

    @property
    def num_tokens(self) -> int:
        return self._table.tokens(self.slot)

    @property
    def kv_tokens(self) -> tuple[int, int] | None:
        """Used, and all that fit its KV cache; None: it has reported nothing."""
        report = self._table.report(self.slot)
        return (report.kv_used_tokens, report.kv_total_tokens) if report is not None else None

    @property
    def half_open(self) -> bool:
        return self._ejection.half_open

    def takes_cost(self, now_s: float) -> bool:
        """Whether a sample for `costs` is wanted now: fitting to every request of thousands a second gains nothing."""
        if now_s < self._costs_due_s:
            return False
        self._costs_due_s = now_s + _COSTS_EVERY_S
        return True

    def begin(self, num_tokens: int) -> None:
        """A request is sent there. `end` it with the same number."""
        self._writer.add(self.slot, 1, num_tokens)
        self._num_own_requests += 1
        if self._ejection.half_open:
            self.num_probes += 1

    def end(self, num_tokens: int) -> None:
        self._writer.add(self.slot, -1, -num_tokens)
        self._num_own_requests -= 1
        if self.num_probes:
            self.num_probes -= 1

    def hold(self) -> None:
        """It keeps a prompt's KV for a D to read: it is not to be stopped. `let_go` when that is over."""
        self._writer.add_leases(self.slot, 1)

    def let_go(self) -> None:
        self._writer.add_leases(self.slot, -1)

    def failed(self, reason: str, cause: object) -> None:
        """It let a request down: `unreachable`, `died`, or a status of its own as `status_503`."""
        self._metrics.failed(reason)
        if self.unhealthy:  # that is known, and was asked as a last resort
            return
        if self._table.is_down(self.slot):  # it has been judged; what it had then fails one by one
            if not self._ejection.half_open:
                self._ejection.ejected_elsewhere()
                self.num_excused = self._num_own_requests
            return
        logger.warning("%s %s %s: %s", self.role, self.name, reason, cause)
        seconds = self._ejection.failed(reason)
        if seconds is not None:
            self._writer.set_down(self.slot, seconds)
            self.num_excused = self._num_own_requests
            self._metrics.ejections.inc()
            self._metrics.ejected.set(1.0)
            logger.warning("%s %s is ejected for %.1f s", self.role, self.name, seconds)
            self.ejected()

    def take_excuse(self) -> bool:
        """Whether a failure is one of those that its loss brings about, each once."""
        if not self.num_excused:
            return False
        self.num_excused -= 1
        return True

    def answered(self) -> None:
        """It has begun to answer a request."""
        if self._ejection.half_open:
            self._ejection.answered()
            self._take_back()

    def succeeded(self) -> None:
        """It has done all of a request."""
        if not self._ejection.clean:
            self._ejection.succeeded()
            self._take_back()

    def set_unhealthy(self, unhealthy: bool, refuses: bool = False) -> None:
        """What its health checks say. If it does not answer them, its requests would wait for their deadlines."""
        self.refuses = refuses
        if unhealthy == self.unhealthy:
            return
        self.unhealthy = unhealthy
        self._metrics.down.set(float(unhealthy))
        logger.warning("%s %s is %s", self.role, self.name, "unhealthy" if unhealthy else "healthy again")
        if unhealthy:
            self.endpoint.abort_all()

    def _take_back(self) -> None:
        self._writer.set_up(self.slot)
        self._metrics.ejected.set(0.0)

    def set_member(self, member: Member) -> None:
        """The registry's newest word on it."""
        self.member = member
        self._metrics.draining.set(float(member.state == "draining"))
