"""The instance with the least to do, counted in requests."""

from collections.abc import Sequence
from operator import attrgetter

from services.global_proxy.policies.base import C, Policy, Prompt, in_turn


class LeastActive(Policy):
    """The fewest requests in flight; each in turn where they are equal."""

    _load = staticmethod(attrgetter("num_requests"))

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        self._turn += 1
        return min(in_turn(candidates, self._turn), key=self._load)


class WeightedLeastActive(LeastActive):
    """The fewest requests in flight, and among those the fewest tokens."""

    _load = staticmethod(attrgetter("num_requests", "num_tokens"))
