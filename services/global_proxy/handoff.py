"""The life of a request between the client and the engines.

1. A request that one hand-off cannot carry goes to D alone (rules.py).
2. Any other goes the way of the engines' connector: P first and then D (sequential.py), or both at once (both_legs.py).
3. D's answer is relayed as it comes; an answer of P other than 200 is the client's.

Once a byte has been relayed nothing is tried again.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from services.global_proxy.legs import Call, Legs, Trace
from services.global_proxy.reply import Reply
from services.global_proxy.rules import SEVERAL_CHOICES, decode_only_reason


class Way(ABC):
    """How KV gets from P to D: who is told what, and when.

    Attributes:
        carries_choices: one hand-off is good for every choice of a request with `n` above 1.
    """

    carries_choices: ClassVar[bool]

    def __init__(self, legs: Legs) -> None:
        self.legs = legs

    @abstractmethod
    async def serve(self, call: Call, reply: Reply, trace: Trace) -> None:
        """Answer `call` through `reply`. Raises like `Handoff.serve`."""

    async def close(self) -> None:
        """End what was begun and outlives a request."""
        return


class Handoff:
    """Serves requests, each by D alone or by P and D."""

    def __init__(self, way: Way) -> None:
        self._way = way

    async def serve(self, call: Call, reply: Reply, trace: Trace) -> None:
        """Answer `call` through `reply`.

        Raises:
            InvalidRequestError: the body cannot be rewritten. Nothing has been sent.
            UpstreamError: an engine failed, and no other could take over.
        """
        reason = decode_only_reason(call.body.fields)
        if reason is None and call.body.n > 1 and not self._way.carries_choices:
            reason = SEVERAL_CHOICES
        if reason is None:
            await self._way.serve(call, reply, trace)
        else:
            await self._way.legs.decode_alone(call, reply, trace, reason)
