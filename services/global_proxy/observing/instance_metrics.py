"""What is counted per instance. Instances come and go: their series go with them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol
from zlib import crc32

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from services.global_proxy.observing.cells import Counter, Gauge, Layout
from services.global_proxy.observing.labels import FAILURE_REASONS, OTHER

_LABELS = ["role", "instance"]
_REASONS = (*FAILURE_REASONS, OTHER)

# Cells of a slot.
_OWNER, _DOWN, _EJECTED, _DRAINING, _EJECTIONS, _FAILURES = range(6)
_SLOT_CELLS = _FAILURES + len(_REASONS)


class Load(Protocol):
    """What an instance has to do, for all workers together; `kv_tokens`: used, and all, as it reports them."""

    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def kv_tokens(self) -> tuple[int, int] | None: ...


class InstanceMetrics:
    """This worker's counts for one instance.

    Attributes:
        ejections: times that it was taken out for failing.
        down, ejected, draining: 1.0 or 0.0, as this worker sees it; call `set`.
    """

    def __init__(self, layout: Layout, at: int, role: str, name: str) -> None:
        self.role = role
        self.name = name
        self.down = Gauge(layout, at + _DOWN)
        self.ejected = Gauge(layout, at + _EJECTED)
        self.draining = Gauge(layout, at + _DRAINING)
        self.ejections = Counter(layout, at + _EJECTIONS)
        self._failures = {reason: Counter(layout, at + _FAILURES + i) for i, reason in enumerate(_REASONS)}

    def failed(self, reason: str) -> None:
        """A leg to it failed; see labels.FAILURE_REASONS."""
        self._failures.get(reason, self._failures[OTHER]).inc()

    def detach(self) -> None:
        """It has left. Requests that are still on their way there count for nobody."""
        for number in (self.down, self.ejected, self.draining, self.ejections, *self._failures.values()):
            number.detach()


class InstanceTable:
    """The instances that this worker knows, by their slot: a number that all workers agree on.

    A slot's cells bear their instance's mark, so that workers that learn of a change at different moments never add up
    one instance's counts with those of its successor in the slot.
    """

    def __init__(self, layout: Layout, num_slots: int) -> None:
        self.read_loads: Callable[[], Iterable[Load]] = tuple
        self._layout = layout
        self._num_slots = num_slots
        self._at = layout.reserve(num_slots * _SLOT_CELLS)
        self._instances: dict[int, InstanceMetrics] = {}
        for slot in range(num_slots):
            for state in (_DOWN, _EJECTED, _DRAINING):  # a worker that starts has no opinion of them yet
                layout.own[self._slot_at(slot) + state] = 0.0

    def add(self, role: str, name: str, slot: int) -> InstanceMetrics:
        """Raises ValueError: no such slot."""
        if not 0 <= slot < self._num_slots:
            raise ValueError(f"instance {name}: slot {slot} is outside the metrics' {self._num_slots} slots")
        at = self._slot_at(slot)
        mark = _mark(role, name)
        if self._layout.own[at + _OWNER] != mark:
            for cell in range(at, at + _SLOT_CELLS):
                self._layout.own[cell] = 0.0
            self._layout.own[at + _OWNER] = mark
        self._instances[slot] = InstanceMetrics(self._layout, at, role, name)
        return self._instances[slot]

    def remove(self, slot: int) -> None:
        """Its series are gone. What is still counted for it is lost."""
        self._instances.pop(slot).detach()
        self._layout.own[self._slot_at(slot) + _OWNER] = 0.0

    def collect(self) -> Iterator[Metric]:
        yield from self._loads()
        for name, text, state in (
            ("ejected", "Taken out for failing (by any worker)", _EJECTED),
            ("draining", "Being drained", _DRAINING),
        ):
            gauge = GaugeMetricFamily(f"omni_proxy_instance_{name}", text, labels=_LABELS)
            for instance, rows, at in self._known():
                gauge.add_metric([instance.role, instance.name], max(row[at + state] for row in rows))
            yield gauge
        up = GaugeMetricFamily("omni_proxy_instance_up", "Answers health checks (of all workers)", labels=_LABELS)
        ejections = CounterMetricFamily("omni_proxy_ejections", "Times taken out for failing", labels=_LABELS)
        failures = CounterMetricFamily(
            "omni_proxy_upstream_failures", "Legs that an instance let down", labels=[*_LABELS, "reason"]
        )
        for instance, rows, at in self._known():
            labels = [instance.role, instance.name]
            up.add_metric(labels, 1.0 - max(row[at + _DOWN] for row in rows))
            ejections.add_metric(labels, sum(row[at + _EJECTIONS] for row in rows))
            for index, reason in enumerate(_REASONS):
                if count := sum(row[at + _FAILURES + index] for row in rows):
                    failures.add_metric([*labels, reason], count)
        yield from (up, ejections, failures)

    def _loads(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("omni_proxy_active_requests", "Legs in flight", labels=_LABELS)
        tokens = GaugeMetricFamily("omni_proxy_active_tokens", "Tokens of the legs in flight", labels=_LABELS)
        kv = GaugeMetricFamily("omni_proxy_kv_tokens", "KV cache, as the engine reports it", labels=[*_LABELS, "part"])
        for load in self.read_loads():
            requests.add_metric([load.role, load.name], load.num_requests)
            tokens.add_metric([load.role, load.name], load.num_tokens)
            for part, num_tokens in zip(("used", "total"), load.kv_tokens or (), strict=False):
                kv.add_metric([load.role, load.name, part], num_tokens)
        yield from (requests, tokens, kv)

    def _known(self) -> Iterator[tuple[InstanceMetrics, "list[memoryview[float]]", int]]:
        """Each instance with the rows that count for it."""
        for slot, instance in self._instances.items():
            at = self._slot_at(slot)
            mark = _mark(instance.role, instance.name)
            yield instance, [row for row in self._layout.rows if row[at + _OWNER] == mark], at

    def _slot_at(self, slot: int) -> int:
        return self._at + slot * _SLOT_CELLS


def _mark(role: str, name: str) -> float:
    """Never 0, and exact as a float."""
    return float(crc32(f"{role} {name}".encode()) + 1)
