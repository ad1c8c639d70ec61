"""P and D at once: D is admitted while P still computes, and takes the KV as its connector and P's agree.

Each is told beforehand how it will know the other. Nothing of D is relayed before P has answered 200: until then P's
failure is the client's answer, or the reason to try another P. Whichever fails first ends the other: its request is
closed, and vLLM aborts it.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from services.global_proxy.errors import UpstreamError
from services.global_proxy.handoff import Way
from services.global_proxy.legs import Answer, Call, Legs, Trace
from services.global_proxy.reply import Reply
from services.global_proxy.upstream import Instance


@dataclass(frozen=True)
class Introduction:
    """What each connector is told of the other: their `kv_transfer_params`."""

    prefill_params: dict[str, Any]
    decode_params: dict[str, Any]
    not_taken: Callable[[], None]  # P may hold KV blocks for it, and D did not take the request


class BothLegs(Way):
    """Legs 1 and 2 in one scope."""

    async def serve(self, call: Call, reply: Reply, trace: Trace) -> None:
        first = self.legs.choose_prefill()
        error = await self._serve_with(first, call, reply, trace)
        if error is None:
            return
        other = self.legs.other_prefill(first, error)
        if other is not None:
            error = await self._serve_with(other, call, reply, trace)
        if error is not None:
            raise error

    @abstractmethod
    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        """Name this P and whichever D to one another. Raises UpstreamError."""

    async def _serve_with(self, prefill: Instance, call: Call, reply: Reply, trace: Trace) -> UpstreamError | None:
        """Answer the client, or return how this P failed: another may do better. Raises UpstreamError for D."""
        try:
            introduction = await self.introduce(call, prefill)
        except UpstreamError as error:
            return error
        attempt = _Attempt(self.legs, call, reply, trace)
        try:
            await attempt.run(prefill, introduction)
        finally:
            if reply.status != 200 and attempt.prefill_refusal is None:
                introduction.not_taken()
        if attempt.decode_error is not None:
            raise attempt.decode_error
        if attempt.prefill_refusal is not None:
            await self.legs.relay_prefill(attempt.prefill_refusal, reply)
        return attempt.prefill_error


class _Attempt:
    """One P and one D at work on a request.

    Attributes: at most one is set; with none, D's answer has been relayed.
        prefill_refusal: P's answer, if it is an error.
        prefill_error, decode_error: how P or D let us down, if it did so first.
    """

    def __init__(self, legs: Legs, call: Call, reply: Reply, trace: Trace) -> None:
        self.prefill_refusal: Answer | None = None
        self.prefill_error: UpstreamError | None = None
        self.decode_error: UpstreamError | None = None
        self._legs = legs
        self._call = call
        self._reply = reply
        self._trace = trace
        self._computed = asyncio.Event()  # P has answered 200

    async def run(self, prefill: Instance, introduction: Introduction) -> None:
        prefill_body = self._call.body.prefill_json(introduction.prefill_params)
        decode_body = self._call.body.decode_json(msgspec.json.encode(introduction.decode_params))
        async with asyncio.TaskGroup() as scope:
            self._prefill_leg = scope.create_task(self._prefill(prefill, prefill_body))
            self._decode_leg = scope.create_task(self._decode(decode_body))

    async def _prefill(self, instance: Instance, body: bytes) -> None:
        try:
            answer = await self._legs.prefill(instance, self._call, body, self._trace)
        except UpstreamError as error:
            self.prefill_error = error
            self._decode_leg.cancel()
            return
        if answer.status == 200:
            self._computed.set()
        else:
            self.prefill_refusal = answer
            self._decode_leg.cancel()

    async def _decode(self, body: bytes) -> None:
        try:
            await self._legs.decode(self._call, body, self._reply, self._trace, self._before_relaying)
        except UpstreamError as error:
            self.decode_error = error
            self._prefill_leg.cancel()

    async def _before_relaying(self, status: int) -> None:
        """D has an answer. An error is the client's at once, and P's work is then for nobody."""
        if status == 200:
            await self._computed.wait()
        else:
            self._prefill_leg.cancel()
