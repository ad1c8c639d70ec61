"""Token buckets on a clock of the test's own, of a proxy that has one worker or several."""

import logging
import os
from collections.abc import Iterator

import pytest

from services.global_proxy.admission.errors import RateLimitError
from services.global_proxy.admission.rate_limit import RateLimiter, RateLimits
from services.global_proxy.membership.bucket_cells import NUM_BUCKETS
from services.global_proxy.membership.load_table import LoadTable

KEY = b"key"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two() -> Iterator[LoadTable]:
    """Of a proxy with two workers."""
    table = LoadTable.create(num_workers=2, num_slots=1)
    yield table
    table.close()


@pytest.fixture(params=[1, 2])
def limiter(request: pytest.FixtureRequest, clock: Clock) -> Iterator[RateLimiter]:
    """Of the first worker of so many."""
    table = LoadTable.create(request.param, num_slots=1)
    yield RateLimiter(table.writer(0).buckets, now_s=clock)
    table.close()


def refused_for_s(limiter: RateLimiter, limits: RateLimits, num_tokens: int = 0, key: bytes = KEY) -> int:
    """Retry-After; 0 if it was let through."""
    try:
        limiter.take(key, limits, num_tokens)
    except RateLimitError as error:
        return error.retry_after_s or -1
    return 0


def test_requests_per_minute(limiter: RateLimiter, clock: Clock) -> None:
    limits = RateLimits(requests_per_minute=6)
    assert [refused_for_s(limiter, limits) for _ in range(7)] == [0] * 6 + [10]
    clock.now_s += 9
    assert refused_for_s(limiter, limits) == 1
    clock.now_s += 1
    assert [refused_for_s(limiter, limits) for _ in range(2)] == [0, 10]
    clock.now_s += 3600
    assert [refused_for_s(limiter, limits) for _ in range(7)] == [0] * 6 + [10], "a quiet hour saves up one minute"
    assert refused_for_s(limiter, limits, key=b"other") == 0


def test_tokens_per_minute(limiter: RateLimiter, clock: Clock) -> None:
    limits = RateLimits(requests_per_minute=3, tokens_per_minute=600)
    assert refused_for_s(limiter, limits, 500) == 0
    assert refused_for_s(limiter, limits, 200) == 10
    limiter.give_back(KEY, 100)
    assert refused_for_s(limiter, limits, 200) == 0, "and the refused one counted for nothing"
    clock.now_s += 60
    assert refused_for_s(limiter, limits, 1800) == 0, "more than a bucket holds is lent"
    assert refused_for_s(limiter, limits, 1) == 60
    clock.now_s += 119
    assert refused_for_s(limiter, limits, 1) == 2
    limiter.give_back(b"nobody", 1)


def test_memory_is_bounded_and_the_busy_are_remembered() -> None:
    limiter = RateLimiter(max_clients=2, now_s=Clock())  # one worker, alone
    limits = RateLimits(requests_per_minute=2)
    for key in (b"a", b"b", b"a", b"c"):
        assert refused_for_s(limiter, limits, key=key) == 0
    assert refused_for_s(limiter, limits, key=b"a") > 0, "b was the one to be forgotten"
    assert refused_for_s(limiter, limits, key=b"b") == 0
    assert len(limiter._clients) == 2


def test_status() -> None:
    assert RateLimitError("", 0.1).status == 429


def test_new_limits_count_from_now(limiter: RateLimiter) -> None:
    for limits in (RateLimits(2), RateLimits(8), RateLimits(3), RateLimits(None, 8), RateLimits(None, 3)):
        assert refused_for_s(limiter, limits) == 0
    assert [refused_for_s(limiter, RateLimits(5)) for _ in range(6)] == [0] * 5 + [12]
    limiter.take(b"free", RateLimits(), 10**9)


def test_a_key_has_its_whole_rate_of_each_worker_and_once_of_all(two: LoadTable, clock: Clock) -> None:
    one, other = (RateLimiter(two.writer(worker).buckets, now_s=clock) for worker in range(2))
    limits = RateLimits(requests_per_minute=6)
    assert [refused_for_s(one, limits) for _ in range(6)] == [0] * 6
    assert [refused_for_s(each, limits) for each in (other, one)] == [10, 10]
    assert refused_for_s(other, limits, key=b"another") == 0
    clock.now_s += 20
    assert [refused_for_s(each, limits) for each in (other, one, other, one)] == [0, 0, 10, 10]


def test_tokens_given_back_to_one_are_there_for_all(two: LoadTable, clock: Clock) -> None:
    one, other = (RateLimiter(two.writer(worker).buckets, now_s=clock) for worker in range(2))
    limits = RateLimits(requests_per_minute=9, tokens_per_minute=600)
    assert refused_for_s(one, limits, 900) == 0
    assert refused_for_s(other, limits, 10) == 31, "what one has lent, the other pays back too"
    one.give_back(KEY, 600)
    assert [refused_for_s(other, limits, 300), refused_for_s(one, limits, 10)] == [0, 1]


def test_a_worker_that_is_started_anew_gives_nothing_twice(two: LoadTable, clock: Clock) -> None:
    limits = RateLimits(requests_per_minute=6)
    other = RateLimiter(two.writer(1).buckets, now_s=clock)
    for _ in range(3):
        mortal = RateLimiter(two.writer(0).buckets, now_s=clock)
        assert [refused_for_s(each, limits) for each in (mortal, other)] == [0, 0]
        two.clear_worker(0)
    anew = RateLimiter(two.writer(0).buckets, now_s=clock)
    assert [refused_for_s(each, limits) for each in (anew, other)] == [10, 10]


def test_requests_and_tokens_are_counted_apart(limiter: RateLimiter) -> None:
    limits = RateLimits(requests_per_minute=4, tokens_per_minute=4)
    assert [refused_for_s(limiter, limits, 2) for _ in range(3)] == [0, 0, 30]


def test_a_client_that_was_forgotten_has_taken_what_it_took(two: LoadTable, clock: Clock) -> None:
    limiter = RateLimiter(two.writer(0).buckets, max_clients=1, now_s=clock)
    limits = RateLimits(requests_per_minute=1)
    assert [refused_for_s(limiter, limits, key=key) for key in (b"a", b"b", b"a")] == [0, 0, 60]
    assert len(limiter._clients) == 1


def test_where_no_more_can_be_shared_each_gives_its_share(
    two: LoadTable, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    os.pwritev(two.fd, [os.urandom(8 * NUM_BUCKETS)], 0, os.RWF_APPEND)
    one, other = (RateLimiter(two.writer(worker).buckets, now_s=clock) for worker in range(2))
    with caplog.at_level(logging.WARNING):
        for limiter in (one, other):
            assert [refused_for_s(limiter, RateLimits(4)) for _ in range(3)] == [0, 0, 30]
            assert [refused_for_s(limiter, RateLimits(1), key=b"least") for _ in range(2)] == [0, 60]
    assert len(caplog.records) == 2, "one of each worker"


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute"])
def test_limits_name_what_is_wrong(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        RateLimits(**{field: 0})
