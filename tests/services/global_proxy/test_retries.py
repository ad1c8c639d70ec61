"""Retry budgets, without a proxy."""

from collections.abc import Iterator

import pytest

from services.global_proxy.errors import DiedError, UnreachableError
from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.retries import RetryBudget
from tests.services.global_proxy.calls import make_call, make_instance

RESERVE = 20


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def instance(metrics: Metrics) -> Iterator[Instance]:
    table = LoadTable.create()
    yield make_instance(table, metrics)
    table.close()


def num_retried(budget: RetryBudget, instance: Instance, num_requests: int) -> int:
    """Of so many requests, each of which fails once."""
    return sum(budget.may_retry(make_call(), DiedError(instance)) for _ in range(num_requests))


def test_one_request_is_retried_so_often(metrics: Metrics, instance: Instance) -> None:
    budget, call = RetryBudget(2, metrics), make_call()
    assert [budget.may_retry(call, DiedError(instance)) for _ in range(3)] == [True, True, False]
    assert call.record.retries == 2
    assert call.tried == {instance}
    labels = {"role": "decode", "reason": "died"}
    assert metrics.registry.get_sample_value("omni_proxy_retries_total", labels) == 2


def test_a_retry_that_is_not_made_costs_nothing(metrics: Metrics, instance: Instance) -> None:
    budget, call = RetryBudget(0, metrics), make_call()
    assert not any(budget.may_retry(call, DiedError(instance)) for _ in range(2 * RESERVE))
    budget = RetryBudget(1, metrics)
    assert num_retried(budget, instance, 2 * RESERVE) == RESERVE


def test_a_share_of_the_requests_may_be_retried(metrics: Metrics, instance: Instance) -> None:
    budget = RetryBudget(2, metrics)
    assert num_retried(budget, instance, 100) == RESERVE
    for _ in range(26):
        budget.request_came()
    assert num_retried(budget, instance, 100) == 5


def test_the_reserve_does_not_grow(metrics: Metrics, instance: Instance) -> None:
    budget = RetryBudget(2, metrics)
    for _ in range(1000):
        budget.request_came()
    assert num_retried(budget, instance, 100) == RESERVE


def test_all_that_a_lost_instance_had_is_retried_and_costs_nothing(metrics: Metrics, instance: Instance) -> None:
    budget = RetryBudget(2, metrics)
    for _ in range(100):
        instance.begin(1)
    instance.failed("unreachable", "refused")
    assert [budget.may_retry(make_call(), UnreachableError(instance)) for _ in range(100)] == [True] * 100
    assert num_retried(budget, instance, 100) == RESERVE
