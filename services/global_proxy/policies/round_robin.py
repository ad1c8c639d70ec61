"""Each in turn."""

import itertools
from collections.abc import Callable, Sequence

from services.global_proxy.policies.base import C, Policy, Prompt


class RoundRobin(Policy):
    """Each in turn, whatever its load.

    Args:
        next_turn: counts the choices, of all worker processes where there are several; else this policy does.
    """

    def __init__(self, next_turn: Callable[[], int] | None = None) -> None:
        self._next_turn = next_turn or itertools.count().__next__

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        return candidates[self._next_turn() % len(candidates)]
