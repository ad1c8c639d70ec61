"""The way of handing off that the settings ask for."""

from kv_transfer.auth import DeploymentKey
from services.global_proxy.leases import LeaseLedger
from services.global_proxy.legs import Legs
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.settings import Settings
from services.global_proxy.ways.layerwise import OmniLayerwise
from services.global_proxy.ways.mooncake import Mooncake
from services.global_proxy.ways.sequential import Nixl, OmniPull
from services.global_proxy.ways.way import Way


def make_way(settings: Settings, key: DeploymentKey | None, legs: Legs, ledger: LeaseLedger) -> Way:
    """`key` is there for our own connector."""
    if settings.connector == "nixl":
        return Nixl(legs, ledger)
    if settings.connector == "mooncake":
        return Mooncake(legs, ledger)
    assert key is not None
    if settings.mode == "layerwise":
        return OmniLayerwise(legs, ledger, LeaseReleaser(key), key)
    return OmniPull(legs, ledger, LeaseReleaser(key))
