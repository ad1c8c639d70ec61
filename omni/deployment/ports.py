"""Which process wants which port on which host, and who wants the same one."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

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

    @property
    def address(self) -> str:
        return "127.0.0.1" if self.host == "localhost" else self.host


def control_port(deployment: Deployment) -> int | None:
    """Where engines join the proxy and report their load; None: nowhere.

    Unless written, it is the next port to listen_port, above if there is one, that nothing else in the file has.
    """
    proxy = deployment.deployment.proxy
    if proxy.control_port is not None:
        return proxy.control_port or None
    own = PortClaim(proxy.host, proxy.listen_port, proxy.listen_port, _CONTROL_PORT).address
    of_other_proxies = {address.rpartition(":")[2] for address in proxy.other_control_addresses}
    taken: set[int] = set()
    for claim in _engine_claims(deployment):
        if claim.address == own or _EVERY_ADDRESS in (claim.address, own):
            taken.update(range(claim.first, claim.last + 1))
    near = chain(range(proxy.listen_port + 1, HIGHEST_PORT + 1), range(proxy.listen_port - 1, 0, -1))
    return next(port for port in near if port not in taken and str(port) not in of_other_proxies)


def port_claims(deployment: Deployment) -> Iterator[PortClaim]:
    yield from _engine_claims(deployment)
    proxy = deployment.deployment.proxy
    yield PortClaim(proxy.host, proxy.listen_port, proxy.listen_port, "deployment.proxy.listen_port")
    if (port := control_port(deployment)) is not None:
        yield PortClaim(proxy.host, port, port, _CONTROL_PORT)


def _engine_claims(deployment: Deployment) -> Iterator[PortClaim]:
    with_kv_port = deployment.services.kv_transfer.roles_with_port
    for group in group_settings(deployment):
        own = partial(_address, deployment, group)
        num_ranks = Counter(nodes[0].host for nodes in group.ranks)
        for host in num_ranks or group.hosts:  # without a layout at least one rank each: what is wrong shows at once
            more = max(1, num_ranks[host]) - 1
            first = group.base_api_port(host)
            yield PortClaim(own(host), first, first + more, _port_field(group, host, "base_api_port"))
            if group.role in with_kv_port:
                first = group.base_kv_port(host)
                yield PortClaim(own(host), first, first + more, _port_field(group, host, "base_kv_port"))
            if group.role == "prefill" and deployment.services.prefill.kv_events:
                first = group.base_event_port(host)
                yield PortClaim(own(host), first, first + 2 * more + 1, _port_field(group, host, "base_event_port"))
        for host in _masters(group):
            port = group.master_port_of(host)
            last = group.link_port_of(host) if any(len(nodes) > 1 for nodes in group.ranks) else port
            yield PortClaim(own(host), port, last, _port_field(group, host, "master_port"))


def _address(deployment: Deployment, group: GroupSettings, host: str) -> str:
    """Clusters give each group an address of its own, whatever the file says."""
    return f"{host} of {group.path}" if deployment.backend in ("ray", "kubernetes") else host


def _masters(group: GroupSettings) -> Iterable[str]:
    """Where DP ranks find each other, and where the hosts of a rank that spans several do."""
    return dict.fromkeys([group.hosts[0], *(nodes[0].host for nodes in group.ranks if len(nodes) > 1)])


def port_problems(deployment: Deployment) -> Iterator[Problem]:
    claims = list(port_claims(deployment))
    for claim in claims:
        if claim.last > HIGHEST_PORT:
            yield Problem(claim.field, f"port {claim} is above {HIGHEST_PORT}", "write a lower port")
    for one, other in _overlapping(claims):
        text = f"port {other} on {other.host} overlaps {one.field} ({one})"
        yield Problem(other.field, text, "give each its own ports")


def _overlapping(claims: list[PortClaim]) -> Iterator[tuple[PortClaim, PortClaim]]:
    """Every two claims that share a port, each pair in the order of `claims`.

    Address by address, and there in the order of ports, so that claims are compared with their neighbours alone: the
    largest deployments have thousands.
    """
    indices_at: dict[str, list[int]] = defaultdict(list)
    for index, claim in enumerate(claims):
        indices_at[claim.address].append(index)
    everywhere = indices_at[_EVERY_ADDRESS]
    pairs: set[tuple[int, int]] = set()
    for address, indices in indices_at.items():
        pairs.update(_overlapping_here(claims, indices if address == _EVERY_ADDRESS else indices + everywhere))
    return ((claims[one], claims[other]) for one, other in sorted(pairs))


def _overlapping_here(claims: list[PortClaim], indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    reaching: list[int] = []  # the earlier ones that end at or behind the first port of this one
    for index in sorted(indices, key=lambda index: claims[index].first):
        reaching = [earlier for earlier in reaching if claims[earlier].last >= claims[index].first]
        yield from ((min(earlier, index), max(earlier, index)) for earlier in reaching)
        reaching.append(index)


def _port_field(group: GroupSettings, host: str, key: str) -> str:
    written = getattr(group.override(host), key) is not None
    return f"{group.path}.host {host}.{key}" if written else f"{group.path}.{key}"
