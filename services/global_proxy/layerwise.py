"""Our own connector, layer by layer: D reads a layer's KV as soon as P has computed it, under the proxy's ticket."""

from collections.abc import Mapping
from functools import partial

from kv_transfer.auth import DeploymentKey
from kv_transfer.ticket import new_ticket
from services.global_proxy.both_legs import BothLegs, Introduction
from services.global_proxy.legs import Call, Legs
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.upstream import Instance

Address = tuple[str, int]


class OmniLayerwise(BothLegs):
    """Args: kv_addresses: where each P is asked for KV, by the instance's name."""

    carries_choices = True

    def __init__(
        self, legs: Legs, leases: LeaseReleaser, key: DeploymentKey, kv_addresses: Mapping[str, Address]
    ) -> None:
        super().__init__(legs)
        self._leases = leases
        self._key = key
        self._kv_addresses = kv_addresses

    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        host, port = self._kv_addresses[prefill.name]
        ticket = new_ticket(self._key, host, port)
        told = ticket.as_params()
        return Introduction(
            {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "omni": {"num_readers": call.body.n, "ticket": told},
            },
            {"do_remote_decode": False, "do_remote_prefill": True, "omni": {"ticket": told}},
            partial(self._leases.release, host, port, ticket.transfer_id),
        )

    async def close(self) -> None:
        await self._leases.close()
