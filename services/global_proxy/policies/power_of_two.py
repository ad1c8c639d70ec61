"""The better of two at random."""

import random
from collections.abc import Sequence
from operator import attrgetter

from services.global_proxy.policies.base import C, Policy, Prompt, Role


class PowerOfTwo(Policy):
    """Of two at random, the one with less load: tokens on P, where each is work to wait for; requests on D.

    Nearly as even as looking at all (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001),
    at the same cost however many instances there are; and several proxies do not all run to the same instance.
    """

    def __init__(self, role: Role) -> None:
        self._load = attrgetter("num_tokens" if role == "prefill" else "num_requests")

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        num = len(candidates)
        if num == 1:
            return candidates[0]
        first = int(random.random() * num)  # noqa: S311 (no secret)
        second = int(random.random() * (num - 1))  # noqa: S311
        one, other = candidates[first], candidates[second + (second >= first)]
        return other if self._load(other) < self._load(one) else one
