"""Who is who: the inventory's hosts, one for each part of an instance, and the machines that they are on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from omni.deployment.groups import GroupSettings, Pool, group_settings
from omni.deployment.model import Access, Deployment, Proxy

LETTERS: Final[dict[Pool, str]] = {"prefill": "P", "decode": "D", "mixed": "M"}
PROXY_GROUP: Final = "C"
PROXY_HOST: Final = "c0"


@dataclass(frozen=True, kw_only=True)
class InventoryHost:
    """One line of the inventory."""

    name: str  # "p1"; "d1_node1": the second host of decode's first group; "c0"
    group: str  # "P", "D", "M" or "C"
    address: str
    access: Access
    instance: str = ""  # "decode.group1"; "" for the proxy
    node_rank: int = 0  # which of the instance's hosts
    api_port: int  # of its first api server, or where the proxy listens
    devices: tuple[int, ...] = ()
    files: tuple[str, ...] = ()  # that must be there, and that nobody copies


def inventory_hosts(deployment: Deployment) -> tuple[InventoryHost, ...]:
    """Every host of every group in the file's order, the proxy last."""
    hosts = [host for group in group_settings(deployment) for host in _hosts_of(group)]
    return (*hosts, _proxy_host(deployment.deployment.proxy))


def _proxy_host(proxy: Proxy) -> InventoryHost:
    written = (proxy.api_keys_file, proxy.tls_certificate_file, proxy.tls_key_file)
    return InventoryHost(
        name=PROXY_HOST,
        group=PROXY_GROUP,
        address=proxy.host,
        access=proxy,
        api_port=proxy.listen_port,
        files=tuple(dict.fromkeys(str(path) for path in written if path is not None)),
    )


def _hosts_of(group: GroupSettings) -> Iterator[InventoryHost]:
    letter = LETTERS[group.role]
    stem = f"{letter.lower()}{group.name.lstrip('abcdefghijklmnopqrstuvwxyz')}"
    for node_rank, address in enumerate(group.hosts):
        yield InventoryHost(
            name=f"{stem}_node{node_rank}" if node_rank else stem,
            group=letter,
            address=address,
            access=_access(group, address),
            instance=f"{group.role}.{group.name}",
            node_rank=node_rank,
            api_port=group.base_api_port(address),
            devices=group.devices(address),
        )


def _access(group: GroupSettings, address: str) -> Access:
    """The host's own where it has one. A private_key there replaces the group's password, and the other way round."""
    own, shared = group.override(address), group.group
    has_own = bool(own.private_key or own.password)
    return Access(
        user=own.user or shared.user,
        private_key=own.private_key if has_own else shared.private_key,
        password=own.password if has_own else shared.password,
    )


@dataclass(frozen=True)
class Machine:
    """All of the inventory's hosts that have one address."""

    hosts: tuple[InventoryHost, ...]

    @property
    def first(self) -> InventoryHost:
        """Acts for the machine where something is done once."""
        return self.hosts[0]

    @property
    def has_engines(self) -> bool:
        return self.first.instance != ""

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(sorted({device for host in self.hosts for device in host.devices}))

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(path for host in self.hosts for path in host.files)

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(host.instance for host in self.hosts if host.instance))


def machines_of(hosts: tuple[InventoryHost, ...]) -> tuple[Machine, ...]:
    """In the order of their first hosts."""
    by_address: dict[str, list[InventoryHost]] = {}
    for host in hosts:
        by_address.setdefault(host.address, []).append(host)
    return tuple(Machine(tuple(group)) for group in by_address.values())
