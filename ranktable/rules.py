"""What must hold across a table's fields. Each rule yields the problems that it finds.

The rules are HCCL's own where it has them: its checks of a rank table refuse ranks, devices and super pod devices that
stand twice (https://www.hiascend.com/document, HCCL user guide, "rank table configuration").
"""

from collections.abc import Callable, Hashable, Iterator

from ranktable.errors import Problem, TableError, at
from ranktable.model import NO_DEVICE, RankTable


def check(table: RankTable) -> None:
    """Raises TableError with every problem of the table."""
    if problems := find_problems(table):
        raise TableError(problems)


def find_problems(table: RankTable) -> list[Problem]:
    return [problem for rule in _RULES for problem in rule(table)]


def _status(table: RankTable) -> Iterator[Problem]:
    if table.status != "completed":
        yield Problem(
            at(table.where, "status"),
            f"{table.status!r}: whoever writes this table is not done",
            "wait for it, or generate the table again",
        )


def _nothing_empty(table: RankTable) -> Iterator[Problem]:
    if not table.groups:
        yield Problem(at(table.where, "server_group_list"), "has no group", "merge at least one local table into it")
    for group in table.groups:
        if not group.servers:
            yield Problem(at(group.where, "server_list"), "has no server", "add the group's servers, or drop the group")
        for server in group.servers:
            if not server.devices:
                yield Problem(
                    at(server.where, "device"), "has no device", "add the server's devices, or drop the server"
                )


def _group_ids(table: RankTable) -> Iterator[Problem]:
    seen = _Seen("give every group an id of its own")
    for group in table.groups:
        yield from seen.add(group.group_id, at(group.where, "group_id"), group.group_id)


def _hosts(table: RankTable) -> Iterator[Problem]:
    """A host may have devices in several groups, under the same id; within a group it stands once."""
    address_owners: dict[str, tuple[str, str]] = {}
    for group in table.groups:
        ids = _Seen("write each server once, with all of its devices")
        addresses = _Seen("give each server its own address")
        for server in group.servers:
            yield from ids.add(server.server_id, at(server.where, "server_id"), server.server_id)
            if server.server_ip is None:
                continue
            where = at(server.where, "server_ip")
            twice = list(addresses.add(server.server_ip, where, server.server_ip))
            yield from twice
            owner, first = address_owners.setdefault(server.server_ip, (server.server_id, where))
            if owner != server.server_id and not twice:
                yield Problem(
                    where,
                    f"{server.server_ip!r} belongs to server {owner!r} at {first}",
                    "give each server its own address",
                )


def _ranks(table: RankTable) -> Iterator[Problem]:
    for group in table.groups:
        ranked = group.by_rank
        seen = _Seen(f"give the group's devices the ranks 0 to {len(ranked) - 1}, each once")
        for _, device in ranked:
            where = at(device.where, "rank_id")
            yield from seen.add(device.rank_id, where, str(device.rank_id))
            if device.rank_id >= len(ranked):
                yield Problem(
                    where,
                    f"'{device.rank_id}' is beyond the group's {len(ranked)} devices: ranks are missing",
                    seen.mend,
                )


def _devices(table: RankTable) -> Iterator[Problem]:
    """Addresses and SDIDs are those of one super pod: another one may have the same."""
    chips = _Seen("write each chip of a server once, in one group")
    addresses = _Seen("give each device the address that hccn_tool shows for it")
    super_devices = _Seen("give each device the SDID that npu-smi shows for it")
    clusters = _Seen("number the devices of the whole table from 1, each once")
    for _, server, device in table.devices:
        pod, where = server.super_pod_id, device.where
        yield from chips.add((server.server_id, device.device_id), at(where, "device_id"), str(device.device_id))
        yield from addresses.add((pod, device.device_ip), at(where, "device_ip"), device.device_ip)
        if device.super_device_id is not None:
            text = str(device.super_device_id)
            yield from super_devices.add((pod, text), at(where, "super_device_id"), text)
        if device.cluster_id is not None:
            yield from clusters.add(device.cluster_id, at(where, "cluster_id"), str(device.cluster_id))


def _super_pods(table: RankTable) -> Iterator[Problem]:
    pods: dict[str, tuple[str | None, str]] = {}
    for group in table.groups:
        for server in group.servers:
            pod, first = pods.setdefault(server.server_id, (server.super_pod_id, server.where))
            if pod != server.super_pod_id:
                yield Problem(
                    at(server.where, "server_id"),
                    f"{server.server_id!r} is in super pod {server.super_pod_id!r} here and in {pod!r} at {first}",
                    "give the server the super pod that npu-smi shows",
                )
    if not table.has_super_pods:
        return
    for _, server, device in table.devices:
        where = at(device.where, "super_device_id")
        if device.super_device_id is None:
            yield Problem(where, "is missing, other devices have one", "use hosts of one generation, A2 or A3")
        elif device.super_device_id >= NO_DEVICE:
            yield Problem(
                where, f"'{device.super_device_id}' stands for no device", "write the SDID that npu-smi shows"
            )
        elif server.super_pod_id is None:
            yield Problem(where, "is set, but the server is in no super pod", "add the server to a super pod")


class _Seen:
    """Finds what stands twice."""

    def __init__(self, mend: str) -> None:
        self.mend = mend
        self._first: dict[Hashable, str] = {}

    def add(self, key: Hashable, where: str, shown: str) -> Iterator[Problem]:
        if key in self._first:
            yield Problem(where, f"{shown!r} stands at {self._first[key]} too", self.mend)
        self._first.setdefault(key, where)


_RULES: tuple[Callable[[RankTable], Iterator[Problem]], ...] = (
    _status,
    _nothing_empty,
    _group_ids,
    _hosts,
    _ranks,
    _devices,
    _super_pods,
)
