"""Which process wants which port on which host, and who wants the same one."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.model import Deployment

HIGHEST_PORT = 65535
_EVERY_ADDRESS = "0.0.0.0"
_CONTROL_PORT = "deployment.proxy.control_port"


@dataclass(frozen=True)
class PortClaim:
    host: str
    first: int
    last: int  # inclusive
    field: str

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def meets(self, other: "PortClaim") -> bool:
        hosts = {"127.0.0.1" if host == "localhost" else host for host in (self.host, other.host)}
        same_host = len(hosts) == 1 or _EVERY_ADDRESS in hosts
        return same_host and self.first <= other.last and other.first <= self.last


def control_port(deployment: Deployment) -> int | None:
    """Where engines join the proxy and report their load; None: nowhere.

    Unless written, it is the next port to listen_port, above if there is one, that nothing else in the file has.
    """
    proxy = deployment.deployment.proxy
    if proxy.control_port is not None:
        return proxy.control_port or None
    of_other_proxies = {address.rpartition(":")[2] for address in proxy.other_control_addresses}
    claims = list(_engine_claims(deployment))
    near = chain(range(proxy.listen_port + 1, HIGHEST_PORT + 1), range(proxy.listen_port - 1, 0, -1))
    free = (PortClaim(proxy.host, port, port, _CONTROL_PORT) for port in near)
    return next(c.first for c in free if str(c) not in of_other_proxies and not any(map(c.meets, claims)))


def port_claims(deployment: Deployment) -> Iterator[PortClaim]:
    yield from _engine_claims(deployment)
    proxy = deployment.deployment.proxy
    yield PortClaim(proxy.host, proxy.listen_port, proxy.listen_port, "deployment.proxy.listen_port")
    if (port := control_port(deployment)) is not None:
        yield PortClaim(proxy.host, port, port, _CONTROL_PORT)


def _engine_claims(deployment: Deployment) -> Iterator[PortClaim]:
    with_kv_port = deployment.services.kv_transfer.roles_with_port
    for group in group_settings(deployment):
        for host in group.hosts:
            more = max(1, group.ranks_on_host(host)) - 1
            first = group.base_api_port(host)
            yield PortClaim(host, first, first + more, _port_field(group, host, "base_api_port"))
            if group.role in with_kv_port:
                first = group.base_kv_port(host)
                yield PortClaim(host, first, first + more, _port_field(group, host, "base_kv_port"))
            if group.role == "prefill" and deployment.services.prefill.kv_events:
                first = group.base_event_port(host)
                yield PortClaim(host, first, first + 2 * more + 1, _port_field(group, host, "base_event_port"))
        port = group.master_port
        yield PortClaim(group.hosts[0], port, port, _port_field(group, group.hosts[0], "master_port"))


def port_problems(deployment: Deployment) -> Iterator[Problem]:
    claims = list(port_claims(deployment))
    for claim in claims:
        if claim.last > HIGHEST_PORT:
            yield Problem(claim.field, f"port {claim} is above {HIGHEST_PORT}", "write a lower port")
    for one, other in combinations(claims, 2):
        if one.meets(other):
            text = f"port {other} on {other.host} overlaps {one.field} ({one})"
            yield Problem(other.field, text, "give each its own ports")


def _port_field(group: GroupSettings, host: str, key: str) -> str:
    written = getattr(group.override(host), key) is not None
    return f"{group.path}.host {host}.{key}" if written else f"{group.path}.{key}"
