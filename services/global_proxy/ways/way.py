"""What a way of handing off is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from services.global_proxy.call import Call
from services.global_proxy.legs import Legs, Opened


class Way(ABC):
    """How KV gets from P to D: who is told what, and when.

    Attributes:
        carries_choices: one hand-off is good for every choice of a request with `n` above 1.
        paths: what it can hand off.
    """

    carries_choices: ClassVar[bool]

    def __init__(self, legs: Legs) -> None:
        self.legs = legs

    @abstractmethod
    async def open(self, call: Call) -> Opened:
        """Both legs, as far as the client's answer can begin.

        Raises:
            InvalidRequestError: the body cannot be rewritten. Nothing has been sent.
            UpstreamError: an engine failed. Whatever it was given is taken back: another may be tried.
            NoInstanceError: there is none to be asked.
        """

    async def close(self) -> None:
        """End what was begun and outlives a request."""
        return
