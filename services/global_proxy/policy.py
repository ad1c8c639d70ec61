"""Choosing one instance out of several."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Policy(Protocol):
    """Chooses one of the candidates, never changing them.

    `candidates` has at least one entry, and may differ from call to call as instances come and go.
    """

    def choose(self, candidates: Sequence[T]) -> T: ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[T]) -> T:
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen
