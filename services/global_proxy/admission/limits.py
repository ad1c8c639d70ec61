"""How many requests may be in flight at once."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

_KEEP_FED = 1.25  # beyond what D can run at once, so that P's work and D's next request overlap with D's present ones


class Limit(ABC):
    """Attributes: value: how many requests may be in flight now, over all workers."""

    value: int

    @abstractmethod
    def ended(self, service_s: float, num_new_tokens: int, num_in_flight: int) -> None:
        """A request ended by itself after `service_s`; `num_in_flight` were so, itself included."""


class FixedLimit(Limit):
    """As configured, or as the decode instances' own limits have it. May be set anew at any time."""

    def __init__(self, value: int) -> None:
        self.value = value

    @classmethod
    def of_decode(cls, max_num_seqs: Iterable[int]) -> "FixedLimit":
        """From each decode instance's `--max-num-seqs`."""
        return cls(max(1, int(sum(max_num_seqs) * _KEEP_FED)))

    def ended(self, service_s: float, num_new_tokens: int, num_in_flight: int) -> None:
        return


class AdaptiveLimit(Limit):
    """Found from latency, where nothing is known of the engines.

    Seconds per token are averaged over windows of requests. While they stay below `tolerance` times what they are
    without load, a limit that was reached is raised; else it is lowered. At `tolerance` 1.5 a batching engine is kept
    at one and a half times the batch beyond which it gains nothing: always fed, and not much slower for it. What
    latency is without load is the least there was, and learned anew whenever less than half of the limit is used.

    Source: additive increase, multiplicative decrease, as in TCP (Jacobson, 1988, with its slow start), on latency as
    in TCP Vegas (Brakmo and Peterson, 1994).
    """

    def __init__(
        self, initial: int = 4, least: int = 2, most: int = 8192, tolerance: float = 1.5, window_size: int = 16
    ) -> None:
        self.value = initial
        self._least = least
        self._most = most
        self._tolerance = tolerance
        self._window_size = window_size
        self._unloaded_s: float | None = None  # per token
        self._is_slow_start = True
        self._peak = 0  # most in flight in this window
        self._start_window()

    def ended(self, service_s: float, num_new_tokens: int, num_in_flight: int) -> None:
        self._num_ended += 1
        self._seconds += service_s
        self._tokens += max(1, num_new_tokens)
        if num_in_flight > self._peak:
            self._peak = num_in_flight
        # As many as are in flight at least, so that a window sees requests that began after the last change.
        if self._num_ended >= self._window_size and self._num_ended >= self.value:
            self._end_window()

    def _start_window(self) -> None:
        self._num_ended = 0
        self._seconds = 0.0
        self._tokens = 0
        self._peak = 0

    def _end_window(self) -> None:
        latency_s = self._seconds / self._tokens
        if self._unloaded_s is None or latency_s < self._unloaded_s:
            self._unloaded_s = latency_s
        elif self._peak * 2 < self.value:
            self._unloaded_s += 0.2 * (latency_s - self._unloaded_s)
        if latency_s > self._tolerance * self._unloaded_s:
            self._is_slow_start = False
            self.value = max(self._least, int(self.value * 0.9))
        elif self._peak >= self.value:
            step = self.value if self._is_slow_start else max(1, self.value // 20)
            self.value = min(self._most, self.value + step)
        self._start_window()
