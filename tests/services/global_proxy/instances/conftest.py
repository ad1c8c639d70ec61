"""Instances without a proxy."""

from collections.abc import Callable, Iterator

import pytest

from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, Member
from services.global_proxy.observing.metrics import Metrics

MakeInstance = Callable[[str], Instance]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Iterator[LoadTable]:
    table = LoadTable.create(now_s=clock)
    yield table
    table.close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make_instance(table: LoadTable, metrics: Metrics) -> MakeInstance:
    """make_instance(url): a decode instance, each in the next slot."""
    writer, num_made = table.writer(0), 0

    def make(url: str) -> Instance:
        nonlocal num_made
        member = Member(InstanceSpec("decode", url), num_made, "active", "file")
        num_made += 1
        counts = metrics.instances.add("decode", member.name, member.slot)
        return Instance(member, table, writer, counts, connect_timeout_s=5.0)

    return make


@pytest.fixture
def failures(metrics: Metrics) -> Callable[[Instance, str], float]:
    """failures(instance, reason): as counted."""

    def count(instance: Instance, reason: str) -> float:
        labels = {"role": instance.role, "instance": instance.name, "reason": reason}
        return metrics.registry.get_sample_value("omni_proxy_upstream_failures_total", labels) or 0.0

    return count
