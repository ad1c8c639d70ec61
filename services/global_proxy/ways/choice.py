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


def make_way(settings: Settings, key: DeploymentKey, legs: Legs, ledger: LeaseLedger) -> Way:
    if settings.connector == "nixl":
        return Nixl(legs, ledger)
    if settings.connector == "mooncake":
        return Mooncake(legs, ledger)
    if settings.mode == "layerwise":
        return OmniLayerwise(legs, ledger, LeaseReleaser(key), key)
    return OmniPull(legs, ledger, LeaseReleaser(key))
