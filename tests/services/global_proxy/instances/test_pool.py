"""Choosing instances, on a clock of our own."""

import pytest

from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.round_robin import RoundRobin
from tests.services.global_proxy.instances.conftest import Clock, MakeInstance

PROMPT = Prompt(num_tokens=1, max_new_tokens=1, session=None, text=b"")


@pytest.fixture
def pool(clock: Clock, table: LoadTable, make_instance: MakeInstance) -> Pool:
    """Two instances."""
    pool = Pool("decode", RoundRobin(), table, clock)
    pool.set_instances([make_instance("http://h:1"), make_instance("http://h:2")])
    return pool


def chosen(pool: Pool, times: int = 4) -> set[Instance | None]:
    return {pool.choose(PROMPT) for _ in range(times)}


def test_one_that_cannot_be_reached_is_ejected_and_comes_back(pool: Pool, clock: Clock) -> None:
    bad, good = pool.instances
    bad.failed("unreachable", "refused")
    pool.changed()
    assert chosen(pool) == {good}
    clock.now_s += 3
    assert chosen(pool) == {bad, good}


def test_one_death_is_no_reason_three_are(pool: Pool) -> None:
    bad, good = pool.instances
    for _ in range(2):
        bad.failed("died", "cut off")
    pool.changed()
    assert chosen(pool) == {bad, good}
    bad.failed("died", "cut off")
    pool.changed()
    assert chosen(pool) == {good}


def test_a_half_open_one_gets_one_request_until_it_answers(pool: Pool, clock: Clock) -> None:
    bad, good = pool.instances
    bad.failed("unreachable", "refused")
    clock.now_s += 3
    bad.begin(1)
    pool.changed()
    assert chosen(pool) == {good}
    bad.succeeded()
    bad.end(1)
    pool.changed()
    assert chosen(pool) == {bad, good}


def test_each_ejection_is_twice_as_long(pool: Pool, clock: Clock) -> None:
    bad, good = pool.instances
    bad.failed("unreachable", "refused")
    clock.now_s += 3
    bad.failed("unreachable", "refused")
    clock.now_s += 3
    assert chosen(pool) == {good}
    clock.now_s += 3
    assert chosen(pool) == {bad, good}


def test_when_all_are_ejected_all_are_tried(pool: Pool) -> None:
    for instance in pool.instances:
        instance.failed("unreachable", "refused")
    pool.changed()
    assert chosen(pool) == set(pool.instances)


def test_an_unhealthy_one_is_never_tried(pool: Pool) -> None:
    for instance in pool.instances:
        instance.set_unhealthy(True)
    pool.changed()
    assert chosen(pool) == {None}
    assert not pool.has_healthy()


def test_a_draining_one_gets_nothing(pool: Pool) -> None:
    leaving, staying = pool.instances
    leaving.set_member(leaving.member.but("draining"))
    pool.changed()
    assert chosen(pool) == {staying}


def test_another_than_those_tried(pool: Pool) -> None:
    first, second = pool.instances
    assert {pool.choose(PROMPT, tried={first}) for _ in range(3)} == {second}
    assert pool.choose(PROMPT, tried={first, second}) is None


def test_an_ejected_one_is_passed_over_from_then_on(pool: Pool) -> None:
    """Not only once the list of those that are up is made again."""
    bad, good = pool.instances
    assert chosen(pool) == {bad, good}
    bad.failed("unreachable", "refused")
    assert chosen(pool) == {good}


def test_only_one_request_goes_to_a_half_open_one(pool: Pool, clock: Clock) -> None:
    bad, good = pool.instances
    bad.failed("unreachable", "refused")
    clock.now_s += 3
    sent = []
    for _ in range(10):
        instance = pool.choose(PROMPT)
        assert instance is not None
        instance.begin(1)
        sent.append(instance)
    assert (sent.count(bad), sent.count(good)) == (1, 9)
