"""Our own connector, layer by layer: D reads a layer's KV as soon as P has computed it, under the proxy's ticket."""

from functools import partial
from urllib.parse import urlsplit

from kv_transfer.auth import DeploymentKey
from kv_transfer.ticket import new_ticket
from services.global_proxy.call import Call
from services.global_proxy.instances.instance import Instance
from services.global_proxy.leases import LeaseLedger
from services.global_proxy.legs import Legs
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.ways.both_legs import BothLegs, Introduction


class OmniLayerwise(BothLegs):
    """P is asked for KV at its member's KV address."""

    carries_choices = True

    def __init__(self, legs: Legs, ledger: LeaseLedger, releaser: LeaseReleaser, key: DeploymentKey) -> None:
        super().__init__(legs, ledger)
        self._releaser = releaser
        self._key = key

    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        host, port = _kv_address(prefill)
        ticket = new_ticket(self._key, host, port)
        told = ticket.as_params()
        return Introduction(
            {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "omni": {"num_readers": call.body.n, "ticket": told},
            },
            {"do_remote_decode": False, "do_remote_prefill": True, "omni": {"ticket": told}},
            partial(self._releaser.release, host, port, ticket.transfer_id),
        )

    async def close(self) -> None:
        await self._releaser.close()


def _kv_address(prefill: Instance) -> tuple[str, int]:
    parts = urlsplit(f"//{prefill.member.spec.kv_address}")
    assert parts.hostname is not None, "members have been checked"
    assert parts.port is not None, "members have been checked"
    return parts.hostname, parts.port
