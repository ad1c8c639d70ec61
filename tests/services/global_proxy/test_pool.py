"""Choosing instances, on a clock of our own."""

from services.global_proxy.metrics import Metrics
from services.global_proxy.policy import RoundRobin
from services.global_proxy.upstream import Instance, Pool


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_pool(num_instances: int, clock: Clock) -> Pool:
    metrics = Metrics()
    instances = [Instance("prefill", f"http://h:{i}", metrics) for i in range(1, num_instances + 1)]
    return Pool("prefill", instances, RoundRobin(), clock)


def test_an_avoided_instance_comes_back() -> None:
    clock = Clock()
    pool = make_pool(2, clock)
    bad, good = pool.instances
    pool.avoid(bad)
    assert {pool.choose() for _ in range(4)} == {good}
    clock.now_s += 2.1
    assert {pool.choose() for _ in range(2)} == {bad, good}


def test_when_all_are_avoided_all_are_tried() -> None:
    pool = make_pool(2, Clock())
    for instance in pool.instances:
        pool.avoid(instance)
    assert {pool.choose() for _ in range(2)} == set(pool.instances)


def test_another_than_the_one_tried() -> None:
    pool = make_pool(2, Clock())
    first, second = pool.instances
    assert {pool.choose(tried=first) for _ in range(3)} == {second}
    assert make_pool(1, Clock()).choose(tried=first) is not None
    lonely = make_pool(1, Clock())
    assert lonely.choose(tried=lonely.instances[0]) is None
