import os
import socket
from collections.abc import Callable, Iterator

import pytest

from omni.deployment.backends.ray.claims import Claims
from omni.deployment.errors import DeploymentError


@pytest.fixture
def two() -> Iterator[tuple[Claims, Claims]]:
    claims = Claims(), Claims()
    yield claims
    for one in claims:
        one.release()


def _pair(base: int) -> tuple[int, ...]:
    return (base, base + 1)


def test_ports_are_given_once(two: tuple[Claims, Claims], free_ports: Callable[[int], int]) -> None:
    first = free_ports(30)
    assert two[0].ports(first, _pair) == first
    assert two[1].ports(first, _pair) == first + 10
    two[0].release()
    assert two[1].ports(first, _pair) == first


def test_ports_that_something_else_listens_on(two: tuple[Claims, Claims], free_ports: Callable[[int], int]) -> None:
    first = free_ports(30)
    with socket.create_server(("127.0.0.1", first + 1)):
        assert two[0].ports(first, _pair) == first + 10
    assert two[1].ports(first, _pair) == first, "nothing of the first try was kept"


def test_no_ports_are_left(two: tuple[Claims, Claims]) -> None:
    with pytest.raises(DeploymentError, match="no ports from 65535 on are free"):
        two[0].ports(65535, _pair)


def test_cores_are_given_once_or_not_at_all(two: tuple[Claims, Claims], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9001, 9002, 9003})  # no machine's: nobody else claims them
    assert two[0].cores(2) == (9001, 9002)
    assert two[1].cores(2) == (), "one is too few: the system shares all out"
    assert Claims().cores(0) == ()
