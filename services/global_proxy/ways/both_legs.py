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

from services.global_proxy.call import Call
from services.global_proxy.instances.instance import Instance
from services.global_proxy.leases import LeaseLedger
from services.global_proxy.legs import Legs, Opened, Prefilled
from services.global_proxy.rules import PREFILL_REFUSED
from services.global_proxy.ways.way import Way


@dataclass(frozen=True)
class Introduction:
    """What each connector is told of the other: their `kv_transfer_params`."""

    prefill_params: dict[str, Any]
    decode_params: dict[str, Any]
    release: Callable[[], None]  # P may hold KV blocks for it, and D did not take the request


class BothLegs(Way):
    """Legs 1 and 2 in one scope."""

    def __init__(self, legs: Legs, ledger: LeaseLedger) -> None:
        super().__init__(legs)
        self._ledger = ledger

    @abstractmethod
    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        """Name this P and whichever D to one another. Raises UpstreamError."""

    async def open(self, call: Call) -> Opened:
        prefill = self.legs.choose(self.legs.prefill_pool, call)
        prefill.hold()  # from here on: who drains it must not find it idle while it is introduced
        try:
            return await self._open_with(prefill, call)
        finally:
            prefill.let_go()

    async def _open_with(self, prefill: Instance, call: Call) -> Opened:
        introduction = await self.introduce(call, prefill)
        prefill_body = call.body.prefill_json(introduction.prefill_params)
        decode_body = call.body.decode_json(msgspec.json.encode(introduction.decode_params))
        lease = self._ledger.open(introduction.release)
        prefill_leg = asyncio.create_task(self.legs.prefill(prefill, call, prefill_body))
        decode_leg = asyncio.create_task(self.legs.decode(call, decode_body))
        opened: Opened | None = None
        try:
            if await self._is_refused(prefill_leg, decode_leg):
                lease.taken()  # P has kept nothing
            else:
                opened = await decode_leg
                if opened.is_good:
                    prefilled = prefill_leg.result()
                    self.legs.read_prefill(call, prefilled)
                    call.num_cached_tokens = prefilled.num_cached_tokens
                    lease.taken()
        except BaseException:
            opened = None
            raise
        finally:
            try:
                await _end(prefill_leg, decode_leg, opened)
            finally:
                lease.give_up()
        return opened or await self.legs.decode_alone(call, PREFILL_REFUSED)

    async def _is_refused(self, prefill_leg: asyncio.Task[Prefilled], decode_leg: asyncio.Task[Opened]) -> bool:
        """Wait until D's answer may be relayed: P has answered 200, or D with an error. Or P refuses the request.

        Raises UpstreamError: P's or D's, whichever failed first.
        """
        await asyncio.wait((prefill_leg, decode_leg), return_when=asyncio.FIRST_COMPLETED)
        if not prefill_leg.done() and not decode_leg.result().is_good:
            return False
        return (await prefill_leg).answer.head.status != 200


async def _end(prefill_leg: asyncio.Task[Prefilled], decode_leg: asyncio.Task[Opened], opened: Opened | None) -> None:
    """Break off whatever is not done, and what D has begun that nobody will have, even if cancelled here."""

    def close_unwanted(done: asyncio.Task[Opened]) -> None:
        if not done.cancelled() and done.exception() is None and done.result() is not opened:
            done.result().close("aborted")

    for leg in (prefill_leg, decode_leg):
        leg.cancel()
    decode_leg.add_done_callback(close_unwanted)
    try:
        await asyncio.gather(prefill_leg, decode_leg, return_exceptions=True)
    except asyncio.CancelledError:
        if opened is not None:
            opened.close("aborted")
        raise
