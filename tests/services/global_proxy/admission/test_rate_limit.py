"""Token buckets on a clock of the test's own."""

import pytest

from services.global_proxy.admission.errors import RateLimitError
from services.global_proxy.admission.rate_limit import RateLimiter, RateLimits

KEY = b"key"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def refused_for_s(limiter: RateLimiter, limits: RateLimits, num_tokens: int = 0, key: bytes = KEY) -> int:
    """Retry-After; 0 if it was let through."""
    try:
        limiter.take(key, limits, num_tokens)
    except RateLimitError as error:
        return error.retry_after_s or -1
    return 0


def test_requests_per_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(now_s=clock)
    limits = RateLimits(requests_per_minute=6)
    assert [refused_for_s(limiter, limits) for _ in range(7)] == [0] * 6 + [10]
    clock.now_s += 9
    assert refused_for_s(limiter, limits) == 1
    clock.now_s += 1
    assert [refused_for_s(limiter, limits) for _ in range(2)] == [0, 10]
    clock.now_s += 3600
    assert [refused_for_s(limiter, limits) for _ in range(7)] == [0] * 6 + [10], "a quiet hour saves up one minute"
    assert refused_for_s(limiter, limits, key=b"other") == 0


def test_tokens_per_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(now_s=clock)
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
    limiter = RateLimiter(max_clients=2, now_s=Clock())
    limits = RateLimits(requests_per_minute=2)
    for key in (b"a", b"b", b"a", b"c"):
        assert refused_for_s(limiter, limits, key=key) == 0
    assert refused_for_s(limiter, limits, key=b"a") > 0, "b was the one to be forgotten"
    assert refused_for_s(limiter, limits, key=b"b") == 0
    assert len(limiter._clients) == 2


def test_status() -> None:
    assert RateLimitError("", 0.1).status == 429


def test_new_limits_count_from_now() -> None:
    limiter = RateLimiter(num_workers=2, now_s=Clock())
    assert [refused_for_s(limiter, RateLimits(4)) for _ in range(3)] == [0, 0, 30], "a worker's share of four is two"
    assert refused_for_s(limiter, RateLimits(8)) == 0
    limiter.take(b"free", RateLimits(), 10**9)


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute"])
def test_limits_name_what_is_wrong(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        RateLimits(**{field: 0})
