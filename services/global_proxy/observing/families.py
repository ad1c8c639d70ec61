"""Metrics by name, from what workers write to what Prometheus reads.

prometheus_client renders them, but does not count: its counters and histograms take a lock and three times as long, and
its way of adding up several processes needs a folder of files.
"""

from abc import ABC, abstractmethod

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from services.global_proxy.observing.cells import Counter, Gauge, Histogram, Layout
from services.global_proxy.observing.labels import OTHER

LabelValue = str | int


class Family(ABC):
    """One metric name with all its series, summed over the workers."""

    def __init__(self, layout: Layout, name: str, text: str) -> None:
        self.layout = layout
        self.name = name
        self.text = text

    @abstractmethod
    def metric(self) -> Metric:
        """As prometheus_client renders it."""


class CounterFamily(Family):
    """A counter without labels."""

    def __init__(self, layout: Layout, name: str, text: str) -> None:
        super().__init__(layout, name, text)
        self._at = layout.reserve(1)
        self.counter = Counter(layout, self._at)

    def metric(self) -> Metric:
        return CounterMetricFamily(self.name, self.text, value=self.layout.total(self._at))


class GaugeFamily(Family):
    """A gauge without labels."""

    def __init__(self, layout: Layout, name: str, text: str) -> None:
        super().__init__(layout, name, text)
        self._at = layout.reserve(1)
        self.gauge = Gauge(layout, self._at)

    def metric(self) -> Metric:
        return GaugeMetricFamily(self.name, self.text, value=self.layout.total(self._at))


class HistogramFamily(Family):
    """A histogram without labels."""

    def __init__(self, layout: Layout, name: str, text: str, upper_bounds: tuple[float, ...]) -> None:
        super().__init__(layout, name, text)
        self._upper_bounds = upper_bounds
        self._at = layout.reserve(len(upper_bounds) + 2)
        self.histogram = Histogram(layout, self._at, upper_bounds)

    def metric(self) -> Metric:
        buckets = []
        count = 0.0
        for index, bound in enumerate((*map(repr, self._upper_bounds), "+Inf")):
            count += self.layout.total(self._at + index)
            buckets.append((bound, count))
        sum_value = self.layout.total(self._at + len(buckets))
        return HistogramMetricFamily(self.name, self.text, buckets=buckets, sum_value=sum_value)


class LabelledCounterFamily(Family):
    """A counter with one or two labels, each of which has a closed list of values (and "other").

    Series that have never counted are not shown.
    """

    def __init__(self, layout: Layout, name: str, text: str, labels: dict[str, tuple[LabelValue, ...]]) -> None:
        super().__init__(layout, name, text)
        self._label_names = list(labels)
        self._label_values = [(*values, OTHER) for values in labels.values()]
        self._indexes = [{value: index for index, value in enumerate(values)} for values in self._label_values]
        num_series = 1
        for values in self._label_values:
            num_series *= len(values)
        self._num_series = num_series
        self._at = layout.reserve(num_series)
        self._counters: dict[tuple[LabelValue, ...], Counter] = {}  # of the values seen, if they are listed

    def labels(self, *values: LabelValue) -> Counter:
        """The counter of these label values, in the order of the labels; keep it where they are known beforehand."""
        return self._counters.get(values) or self._first_use(values)

    def _first_use(self, values: tuple[LabelValue, ...]) -> Counter:
        assert len(values) == len(self._indexes), f"{self.name} has the labels {self._label_names}"
        offset = 0
        for index, value in zip(self._indexes, values, strict=True):
            offset = offset * len(index) + index.get(value, index[OTHER])
        counter = Counter(self.layout, self._at + offset)
        if all(value in index for index, value in zip(self._indexes, values, strict=True)):
            self._counters[values] = counter
        return counter

    def metric(self) -> Metric:
        metric = CounterMetricFamily(self.name, self.text, labels=self._label_names)
        for offset in range(self._num_series):
            if count := self.layout.total(self._at + offset):
                metric.add_metric(self._values_at(offset), count)
        return metric

    def _values_at(self, offset: int) -> list[str]:
        found = []
        for values in reversed(self._label_values):
            offset, index = divmod(offset, len(values))
            found.append(str(values[index]))
        return found[::-1]
