"""P first, then D: what P's connector returns with the finished prompt goes, unread, to D's connector."""

from abc import abstractmethod
from typing import Any

import msgspec

from services.global_proxy.errors import DiedError, UpstreamError
from services.global_proxy.handoff import Way
from services.global_proxy.legs import Answer, Call, Legs, Trace
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.reply import Reply
from services.global_proxy.request_body import RequestBody
from services.global_proxy.rules import NO_HANDOFF
from services.global_proxy.upstream import Instance

_NULL = msgspec.Raw(b"null")

# What NIXL's schedulers look for; ours goes by the same names.
_KEEP_FOR_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NULL


class Sequential(Way):
    """Leg 1, then leg 2."""

    async def serve(self, call: Call, reply: Reply, trace: Trace) -> None:
        answer, params = await self._prefill(call, trace)
        if answer.status != 200:
            await self.legs.relay_prefill(answer, reply)
        elif params == _NULL:
            await self.legs.decode_alone(call, reply, trace, NO_HANDOFF)
        else:
            await self._decode(call, params, reply, trace)

    @abstractmethod
    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        """What P's connector is told."""

    @abstractmethod
    def not_taken(self, params: msgspec.Raw) -> None:
        """P holds KV blocks under these parameters, and D did not take the request."""

    async def _prefill(self, call: Call, trace: Trace) -> tuple[Answer, msgspec.Raw]:
        """Leg 1. Whatever went wrong on one P, another is tried."""
        body = call.body.prefill_json(self.prefill_params(call.body))
        first = self.legs.choose_prefill()
        try:
            return await self._prefill_on(first, call, body, trace)
        except UpstreamError as error:
            other = self.legs.other_prefill(first, error)
            if other is None:
                raise
            return await self._prefill_on(other, call, body, trace)

    async def _prefill_on(
        self, instance: Instance, call: Call, body: bytes, trace: Trace
    ) -> tuple[Answer, msgspec.Raw]:
        """P's answer, and what it hands off: null if nothing."""
        answer = await self.legs.prefill(instance, call, body, trace)
        if answer.status != 200:
            return answer, _NULL
        try:
            return answer, msgspec.json.decode(answer.body, type=_PrefillAnswer).kv_transfer_params
        except ValueError as error:
            nonsense = DiedError("The prefill instance's answer is nonsense")
            raise self.legs.prefill_failed(instance, nonsense, error) from error

    async def _decode(self, call: Call, params: msgspec.Raw, reply: Reply, trace: Trace) -> None:
        """Leg 2."""
        try:
            await self.legs.decode(call, call.body.decode_json(params), reply, trace)
        finally:
            if reply.status != 200:
                self.not_taken(params)


class OmniPull(Sequential):
    """Our own connector: the blocks wait on P under a lease, which the proxy ends if D does not take the request."""

    carries_choices = True

    def __init__(self, legs: Legs, leases: LeaseReleaser) -> None:
        super().__init__(legs)
        self._leases = leases

    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        return _KEEP_FOR_DECODE | {"omni": {"num_readers": body.n}}

    def not_taken(self, params: msgspec.Raw) -> None:
        self._leases.release_hand_off(params)

    async def close(self) -> None:
        await self._leases.close()


class Nixl(Sequential):
    """vLLM's NixlConnector: P gives the blocks back once one sequence has read them, so there is only one.

    A D that refuses the request tells P so itself. If none could be reached, nobody can: there is no HTTP call for it,
    and the lease ends by itself (after 30 s unless the engines' `kv_lease_duration` says otherwise).
    """

    carries_choices = False

    def prefill_params(self, body: RequestBody) -> dict[str, Any]:
        return _KEEP_FOR_DECODE

    def not_taken(self, params: msgspec.Raw) -> None:
        return
