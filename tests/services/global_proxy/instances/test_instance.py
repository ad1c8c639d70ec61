"""An instance's load and its ejections, on a clock of our own."""

from services.global_proxy.instances.instance import Instance
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.observing.metrics import Metrics
from tests.services.global_proxy.instances.conftest import Clock, MakeInstance


def gauge(metrics: Metrics, instance: Instance, name: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"role": instance.role, "instance": instance.name})


def test_the_requests_that_it_had_do_not_eject_it_again(
    make_instance: MakeInstance, table: LoadTable, clock: Clock, metrics: Metrics
) -> None:
    """A lost instance lets all of them down within a moment. It is ejected for two seconds, not for sixty."""
    instance = make_instance("http://h:1")
    for _ in range(100):
        instance.begin(1)
    for _ in range(100):
        instance.failed("died", "lost")
        instance.end(1)
    assert gauge(metrics, instance, "omni_proxy_ejections_total") == 1
    assert table.is_down(instance.slot)
    clock.now_s += 3
    assert not table.is_down(instance.slot)


def test_only_these_are_excused(make_instance: MakeInstance) -> None:
    instance, other = make_instance("http://h:1"), make_instance("http://h:2")
    other.begin(1)
    for _ in range(5):
        instance.begin(1)
    excused = []
    for _ in range(5):
        instance.failed("died", "lost")
        excused.append(instance.take_excuse())
        instance.end(1)
    assert excused == [False, False, True, True, True]  # two deaths are no loss yet
    assert not instance.take_excuse()
    assert not other.take_excuse()


def test_what_another_worker_ejected_is_excused_too(
    make_instance: MakeInstance, table: LoadTable, clock: Clock
) -> None:
    instance = make_instance("http://h:1")
    for _ in range(3):
        instance.begin(1)
    table.registry_verdicts().set_down(instance.slot, 2.0)
    instance.failed("died", "lost")
    assert [instance.take_excuse() for _ in range(4)] == [True, True, True, False]
    instance.failed("died", "lost")
    assert not instance.take_excuse()
    assert instance.half_open
    clock.now_s += 1
    instance.answered()
    assert not table.is_down(instance.slot)


def test_of_a_lost_instance_those_who_choose_hear_at_once(make_instance: MakeInstance) -> None:
    instance = make_instance("http://h:1")
    heard = []
    instance.ejected = lambda: heard.append(instance.half_open)
    instance.failed("unreachable", "refused")
    assert heard == [True]


def test_an_answer_takes_it_back(make_instance: MakeInstance, table: LoadTable, metrics: Metrics) -> None:
    instance = make_instance("http://h:1")
    instance.failed("unreachable", "refused")
    assert gauge(metrics, instance, "omni_proxy_instance_ejected") == 1
    instance.answered()
    assert not table.is_down(instance.slot)
    assert gauge(metrics, instance, "omni_proxy_instance_ejected") == 0


def test_costs_are_not_fitted_to_every_request(make_instance: MakeInstance) -> None:
    instance = make_instance("http://h:1")
    taken = [instance.takes_cost(now_s) for now_s in (5.0, 5.001, 5.019, 5.021, 5.022)]
    assert taken == [True, False, False, True, False]
