"""What the proxy counts. Every name starts with omni_proxy_.

Whoever counts keeps the counter, gauge or histogram in a variable of its own: an update is then a fraction of a
microsecond. Nothing is computed before somebody asks for /metrics.
"""

from collections.abc import Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from services.global_proxy.observing import labels
from services.global_proxy.observing.cells import Cells, Counter, Gauge, Histogram, Layout
from services.global_proxy.observing.families import (
    CounterFamily,
    Family,
    GaugeFamily,
    HistogramFamily,
    LabelledCounterFamily,
    LabelValue,
)
from services.global_proxy.observing.instance_metrics import InstanceTable

_NUM_SLOTS = 256
_REQUEST_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)

F = TypeVar("F", bound=Family)


class Metrics:
    """One process's metrics: a worker's, or the registry's. What it shows are the sums over all of them.

    Its registry is its own, so that two proxies in one process do not share counts.

    Args:
        cells: shared by the processes; None for a single one.
        worker: whose row this process writes.
        num_slots: instances that can be there at once; the load table's.

    Raises:
        ValueError: more slots than fit.
    """

    def __init__(self, cells: Cells | None = None, worker: int = 0, num_slots: int = _NUM_SLOTS) -> None:
        if cells is None:
            cells = Cells()
            cells.close()  # nobody shares them
        self._layout = Layout(cells, worker)
        self._families: list[Family] = []
        self.requests = self._labelled(
            "requests",
            "Requests, by answer; 499: the client left",
            {"endpoint": labels.ENDPOINTS, "code": labels.STATUS_CODES},
        )
        self.request_seconds = self._seconds("request", "From the request's headers to the answer's last byte")
        self.queue_seconds = self._seconds("queue", "From the request's body to its admission")
        self.prefill_seconds = self._seconds("prefill", "Leg 1, from sending it to P to its whole answer")
        self.ttft_seconds = self._seconds("ttft", "From the request's headers to the first body byte from D")
        self.tpot_seconds = self._seconds(
            "tpot", "From D's first chunk to its last, per chunk after the first", _TOKEN_S
        )
        self.itl_seconds = self._seconds("itl", "Between two chunks of a stream, as D sends them", _TOKEN_S)
        self.in_flight = self._gauge("requests_in_flight", "Requests being served, those in the queue included")
        self.queued = self._gauge("requests_queued", "Requests waiting to be admitted")
        self.open_leases = self._gauge("open_leases", "Prompts whose KV a P keeps for requests that are being served")
        self.decode_only = self._labelled(
            "decode_only", "Requests that D served alone", {"reason": labels.DECODE_ONLY_REASONS}
        )
        self.mixed = self._labelled(
            "mixed", "Requests given to a mixed instance, whole", {"reason": labels.MIXED_REASONS}
        )
        self.refused = self._labelled("refused", "Requests turned away unserved", {"reason": labels.REFUSED_REASONS})
        self.joins_refused = self._labelled(
            "joins_refused", "Streams refused on the control plane", {"reason": labels.JOIN_REFUSALS}
        )
        self.retries = self._labelled(
            "retries", "Legs sent again, elsewhere", {"role": labels.ROLES, "reason": labels.RETRY_REASONS}
        )
        self.continued_streams = self._counter("continued_streams", "Streams that another D went on with")
        self.received_bytes = self._counter("received_bytes", "Of clients' request bodies")
        self.sent_bytes = self._counter("sent_bytes", "Of answers' bodies, to clients")
        self.prompt_tokens = self._counter("prompt_tokens", "Of the requests admitted; estimated where P was not asked")
        self.log_lines_dropped = self._counter("log_lines_dropped", "Requests whose log line could not be written")
        self.traces = self._labelled(
            "traces", "Requests traced, by what became of it", {"outcome": labels.TRACE_OUTCOMES}
        )
        self.instances = InstanceTable(self._layout, num_slots)
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(self._families, self.instances))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text for /metrics and its content type, in the format that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _seconds(self, name: str, text: str, upper_bounds: tuple[float, ...] = _REQUEST_S) -> Histogram:
        return self._add(HistogramFamily(self._layout, f"omni_proxy_{name}_seconds", text, upper_bounds)).histogram

    def _counter(self, name: str, text: str) -> Counter:
        return self._add(CounterFamily(self._layout, f"omni_proxy_{name}", text)).counter

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._add(GaugeFamily(self._layout, f"omni_proxy_{name}", text)).gauge

    def _labelled(self, name: str, text: str, values: dict[str, tuple[LabelValue, ...]]) -> LabelledCounterFamily:
        return self._add(LabelledCounterFamily(self._layout, f"omni_proxy_{name}", text, values))

    def _add(self, family: F) -> F:
        self._families.append(family)
        return family


class _Collector:
    """What the registry asks when somebody reads /metrics."""

    def __init__(self, families: list[Family], instances: InstanceTable) -> None:
        self._families = families
        self._instances = instances

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family.metric()
        yield from self._instances.collect()
