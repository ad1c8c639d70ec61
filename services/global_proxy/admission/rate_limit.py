"""How much each client may ask for: token buckets, of requests and of tokens, by the minute."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.global_proxy.admission.errors import RateLimitError
from services.global_proxy.admission.shared_bucket import SharedBucket
from services.global_proxy.membership.bucket_cells import NUM_BUCKETS, BucketCells

logger = logging.getLogger(__name__)

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Of one client; None: no limit. A minute's worth may come at once.

    Raises:
        ValueError: naming the field.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and the most that may be generated

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be 1 or more, got {value}")


class _Bucket:
    """Full again a minute after it was empty."""

    __slots__ = ("_level", "_per_s", "_size", "_then_s")

    def __init__(self, size: int, now_s: float) -> None:
        self._size = float(size)
        self._level = self._size
        self._per_s = size / _MINUTE_S
        self._then_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` is there. More than a bucket holds is taken from a full one, which then owes."""
        level = self._level + (now_s - self._then_s) * self._per_s
        self._level = level = level if level < self._size else self._size
        self._then_s = now_s
        lacking = (amount if amount < self._size else self._size) - level
        return lacking / self._per_s if lacking > 0 else 0.0

    def take(self, amount: float) -> None:
        self._level -= amount


_AnyBucket = _Bucket | SharedBucket
_Client = tuple[RateLimits, _AnyBucket | None, _AnyBucket | None]  # of requests, of tokens


class RateLimiter:
    """Per client. Limits that change count from now: their buckets are others.

    Clients are forgotten, the least recently seen first, beyond `max_clients`: memory stays bounded. What workers share
    is not forgotten with them. Where it has no room for one more bucket, each worker gives an N-th of the rate.

    Args:
        shared: with the proxy's other workers; None: there are none.
    """

    def __init__(
        self,
        shared: BucketCells | None = None,
        max_clients: int = 10_000,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_clients = max_clients
        self._shared = shared
        self._now_s = now_s
        self._clients: dict[bytes, _Client] = {}  # the latest seen last
        self._is_full = False  # the shared memory, and it has been logged

    def take(self, client: bytes, limits: RateLimits, num_tokens: int) -> None:
        """Count a request of `num_tokens` (prompt and the most that may be generated).

        Raises:
            RateLimitError: nothing was counted; it says when to come again.
        """
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            return
        now_s = self._now_s()
        known = self._clients.pop(client, None)
        if known is None or (known[0] is not limits and known[0] != limits):
            known = self._new_client(client, limits, now_s)
        self._clients[client] = known
        _, requests, tokens = known
        if requests is not None and (wait_s := requests.wait_s(1, now_s)):
            raise RateLimitError(f"More than {limits.requests_per_minute} requests a minute; try again later", wait_s)
        if tokens is not None:
            if wait_s := tokens.wait_s(num_tokens, now_s):
                raise RateLimitError(f"More than {limits.tokens_per_minute} tokens a minute; try again later", wait_s)
            tokens.take(num_tokens)
        if requests is not None:
            requests.take(1)

    def give_back(self, client: bytes, num_tokens: int) -> None:
        """Tokens that were counted and not generated."""
        known = self._clients.get(client)
        if known is not None and known[2] is not None:
            known[2].take(-num_tokens)

    def _new_client(self, client: bytes, limits: RateLimits, now_s: float) -> _Client:
        if len(self._clients) >= self._max_clients:
            del self._clients[next(iter(self._clients))]
        return (
            limits,
            self._bucket(b"requests", client, limits.requests_per_minute, now_s),
            self._bucket(b"tokens", client, limits.tokens_per_minute, now_s),
        )

    def _bucket(self, what: bytes, client: bytes, per_minute: int | None, now_s: float) -> _AnyBucket | None:
        if per_minute is None:
            return None
        if self._shared is None:
            return _Bucket(per_minute, now_s)
        cells = self._shared.of(b"%b %d %b" % (what, per_minute, client))
        if cells is not None:
            return SharedBucket(per_minute, cells, self._shared.worker)
        if not self._is_full:
            self._is_full = True
            logger.warning("rate limits: beyond %d each worker gives its share: restart the proxy", NUM_BUCKETS)
        return _Bucket(max(1, per_minute // self._shared.num_workers), now_s)
