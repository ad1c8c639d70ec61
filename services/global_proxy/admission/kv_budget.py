"""How much KV the decode instances have, and how much of it is spoken for.

A request is given, when it starts, all the KV it may come to need: its prompt's, and of its `max_tokens` the part that
nine in ten requests use, which is learned as they end. Without that part a client who asks for 4096 tokens and stops
after 50 would keep others out; without any reservation D would preempt, which costs a prompt computed twice.
"""

from typing import Protocol

_QUANTILE = 0.9
_STEP = 0.02
_MIN_FRACTION = 0.05


class Sized(Protocol):
    """A request's prompt: all of it that counts here."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...


class KvBudget:
    """Tokens of KV on all decode instances together.

    Attributes:
        capacity_tokens: what there is; None if nobody knows, and then there is always room.
        reserved_tokens: of this process's requests in flight, from their start to their end.
        in_transit_tokens: of those among them that are not on D yet: P computes them, or their KV is on its way.
        fraction: of `max_new_tokens`, what a request is given.
    """

    def __init__(self, capacity_tokens: int | None = None) -> None:
        self.capacity_tokens = capacity_tokens
        self.reserved_tokens = 0
        self.in_transit_tokens = 0
        self.fraction = 1.0
        self._used_tokens = 0

    def report(self, capacity_tokens: int | None, used_tokens: int) -> None:
        """What the decode instances say of themselves, summed; requests that came by other proxies count in it."""
        self.capacity_tokens = capacity_tokens
        self._used_tokens = used_tokens

    def need(self, prompt: Sized) -> int:
        """What a request is given. At least 1."""
        return prompt.num_tokens + int(prompt.max_new_tokens * self.fraction) + 1

    def has_room(self, need_tokens: int, elsewhere_tokens: int = 0) -> bool:
        """Whether that much is free. `elsewhere_tokens`: reserved by the proxy's other workers.

        What is reserved and what D reports overlap, since D reports what it holds of ours too: the larger counts.
        """
        if self.capacity_tokens is None:
            return True
        taken = self.reserved_tokens + elsewhere_tokens
        reported = self._used_tokens + self.in_transit_tokens
        return (taken if taken > reported else reported) + need_tokens <= self.capacity_tokens

    def reserve(self, num_tokens: int) -> None:
        self.reserved_tokens += num_tokens
        self.in_transit_tokens += num_tokens

    def arrived(self, num_tokens: int) -> None:
        """D has answered: from now on its reports count this request."""
        self.in_transit_tokens -= num_tokens

    def release(self, num_tokens: int, has_arrived: bool) -> None:
        self.reserved_tokens -= num_tokens
        if not has_arrived:
            self.in_transit_tokens -= num_tokens
        assert self.reserved_tokens >= self.in_transit_tokens >= 0, "released more than was reserved"

    def learn(self, num_new_tokens: int, max_new_tokens: int) -> None:
        """A request that ended by itself used so many: the fraction moves towards the 90th percentile.

        Source: stochastic approximation of a quantile (Robbins and Monro, 1951).
        """
        if max_new_tokens <= 0:
            return
        was_enough = num_new_tokens <= max_new_tokens * self.fraction
        moved = self.fraction + (-_STEP * (1 - _QUANTILE) if was_enough else _STEP * _QUANTILE)
        self.fraction = min(1.0, max(_MIN_FRACTION, moved))
