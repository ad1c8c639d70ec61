"""P first, then D: what P's connector returns with the finished prompt goes, unread, to D's connector."""

from abc import abstractmethod
from typing import Any

import msgspec

from services.global_proxy.call import Call
from services.global_proxy.leases import LeaseLedger, OpenLease
from services.global_proxy.legs import NULL, Legs, Opened
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.request_body import RequestBody
from services.global_proxy.rules import NO_HANDOFF, PREFILL_REFUSED
from services.global_proxy.ways.way import Way

# What NIXL's schedulers look for; ours goes by the same names.
_KEEP_FOR_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Sequential(Way):
    """Leg 1, then leg 2."""

    async def open(self, call: Call) -> Opened:
        prefill = self.legs.choose(self.legs.prefill_pool, call)
        body = call.body.prefill_json(self.prefill_params(call.body), want_token_ids=call.body.takes_token_ids)
        prefilled = await self.legs.prefill(prefill, call, body)
        if prefilled.answer.head.status != 200:
            return await self.legs.decode_alone(call, PREFILL_REFUSED)
        params = self.legs.read_prefill(call, prefilled)
        if params == NULL:
            return await self.legs.decode_alone(call, NO_HANDOFF)
        lease = self.open_lease(params)
        prefill.hold()
        try:
            opened = await self.legs.decode(call, call.body.decode_json(params, call.prompt_token_ids))
            if opened.is_good:
                lease.taken()
                self.legs.saw_handoff(prefilled)
            return opened
        finally:
            lease.give_up()
            prefill.let_go()

    @abstractmethod
    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        """What P's connector is told."""

    @abstractmethod
    def open_lease(self, params: msgspec.Raw) -> OpenLease:
        """P holds KV blocks under these parameters."""


class OmniPull(Sequential):
    """Our own connector: the blocks wait on P under a lease, which the proxy ends if D does not take the request."""

    carries_choices = True

    def __init__(self, legs: Legs, ledger: LeaseLedger, releaser: LeaseReleaser) -> None:
        super().__init__(legs)
        self._ledger = ledger
        self._releaser = releaser

    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        return _KEEP_FOR_DECODE | {"omni": {"num_readers": body.n}}

    def open_lease(self, params: msgspec.Raw) -> OpenLease:
        return self._ledger.open(lambda: self._releaser.release_hand_off(params))

    async def close(self) -> None:
        await self._releaser.close()


class Nixl(Sequential):
    """vLLM's NixlConnector: P gives the blocks back once one sequence has read them, so there is only one.

    A D that refuses the request tells P so itself. If none could be reached, nobody can: there is no HTTP call for it,
    and the lease ends by itself (after 30 s unless the engines' `kv_lease_duration` says otherwise).
    """

    carries_choices = False

    def __init__(self, legs: Legs, ledger: LeaseLedger) -> None:
        super().__init__(legs)
        self._ledger = ledger

    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        return _KEEP_FOR_DECODE

    def open_lease(self, params: msgspec.Raw) -> OpenLease:
        return self._ledger.open(lambda: None)
