"""The ways of handing off, by the engines' connector and its mode."""

from collections.abc import Iterable
from typing import TypeVar
from urllib.parse import urlsplit

from kv_transfer.auth import DeploymentKey
from services.global_proxy.handoff import Way
from services.global_proxy.layerwise import Address, OmniLayerwise
from services.global_proxy.legs import Legs
from services.global_proxy.mooncake import BootstrapServer, Mooncake
from services.global_proxy.release import LeaseReleaser
from services.global_proxy.sequential import Nixl, OmniPull
from services.global_proxy.settings import Settings
from services.global_proxy.upstream import EngineClient, Pool

T = TypeVar("T")


def make_way(settings: Settings, key: DeploymentKey | None, prefill: Pool, legs: Legs, client: EngineClient) -> Way:
    """The settings' own. `key` is there for our own connector."""
    if settings.connector == "nixl":
        return Nixl(legs)
    if settings.connector == "mooncake":
        return Mooncake(legs, client, _of_each(prefill, map(BootstrapServer, settings.bootstrap_urls)))
    assert key is not None
    if settings.mode == "layerwise":
        return OmniLayerwise(legs, LeaseReleaser(key), key, _of_each(prefill, map(_address, settings.kv_addresses)))
    return OmniPull(legs, LeaseReleaser(key))


def _of_each(prefill: Pool, things: Iterable[T]) -> dict[str, T]:
    return dict(zip((instance.name for instance in prefill.instances), things, strict=True))


def _address(host_and_port: str) -> Address:
    parts = urlsplit(f"//{host_and_port}")
    assert parts.hostname is not None, "settings have been checked"
    assert parts.port is not None, "settings have been checked"
    return parts.hostname, parts.port
