"""Which instances a request may still be sent to."""

from collections.abc import Iterator

import pytest

from services.global_proxy.errors import DiedError, UnreachableError
from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.observing.metrics import Metrics
from tests.services.global_proxy.calls import make_call, make_instance


@pytest.fixture
def instances() -> Iterator[tuple[Instance, ...]]:
    table, metrics = LoadTable.create(), Metrics()
    yield tuple(make_instance(table, metrics, slot) for slot in range(2))
    table.close()


def test_one_that_could_not_be_reached_gets_one_more_chance(instances: tuple[Instance, ...]) -> None:
    call, (first, second) = make_call(), instances
    call.note_failure(UnreachableError(first))
    call.note_failure(DiedError(second))
    assert call.tried == {first, second}
    assert call.take_second_chance(instances) is first
    call.note_failure(UnreachableError(first))
    assert call.take_second_chance(instances) is None


def test_only_one_that_is_there_and_takes_requests(instances: tuple[Instance, ...]) -> None:
    call, (first, second) = make_call(), instances
    for instance in instances:
        call.note_failure(UnreachableError(instance))
    first.unhealthy = True
    second.set_member(second.member.but("draining"))
    assert call.take_second_chance(instances) is None
    second.set_member(second.member.but("active"))
    assert call.take_second_chance(instances[:1]) is None
    assert call.take_second_chance(instances) is second
