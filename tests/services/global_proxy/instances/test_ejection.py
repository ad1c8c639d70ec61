"""One instance's record."""

import pytest

from services.global_proxy.instances.ejection import Ejection


def seconds(ejection: Ejection, *reasons: str) -> float | None:
    """Of the ejection that the last of these failures brings."""
    *others, last = reasons
    assert [ejection.failed(reason) for reason in others] == [None] * len(others)
    return ejection.failed(last)


def test_what_ejects() -> None:
    assert 2.0 <= (seconds(Ejection(), "unreachable") or 0) <= 2.5
    assert 2.0 <= (seconds(Ejection(), "died", "status_503", "nonsense") or 0) <= 2.5
    assert seconds(Ejection(), "died", "died") is None


@pytest.mark.parametrize("times", [1, 2, 3, 4, 20])
def test_each_is_twice_as_long_within_bounds(times: int) -> None:
    ejection = Ejection()
    found = [seconds(ejection, "unreachable") for _ in range(times)][-1]
    bound = min(2.0**times, 60.0)
    assert bound <= (found or 0) <= bound * 1.25


def test_a_failed_probe_ejects_at_once() -> None:
    ejection = Ejection()
    ejection.failed("unreachable")
    assert ejection.half_open
    assert 4.0 <= (ejection.failed("died") or 0) <= 5.0


def test_beginning_to_answer_is_not_yet_doing_it() -> None:
    ejection = Ejection()
    ejection.failed("unreachable")
    ejection.answered()
    assert not ejection.half_open
    assert not ejection.clean
    assert 4.0 <= (seconds(ejection, "died", "died", "died") or 0) <= 5.0


def test_doing_a_request_makes_up_for_all() -> None:
    ejection = Ejection()
    ejection.failed("unreachable")
    ejection.succeeded()
    assert ejection.clean
    assert not ejection.half_open
    assert 2.0 <= (seconds(ejection, "died", "died", "died") or 0) <= 2.5
