"""vllm-ascend's form: all prefill devices in one list, all decode devices in another.

    {"version": "1.2", "server_count": "2", "prefill_device_list": [
        {"server_id": "10.0.0.1", "device_id": "0", "device_ip": "192.168.1.8", "super_pod_id": "0",
         "super_device_id": "16777216", "cluster_id": "1"}],
     "decode_device_list": [...], "status": "completed"}

super_pod_id and super_device_id are for A3; the version is 1.2 on A2 as well. A device's place in its list is its
rank (newer files repeat it as rank_id), cluster_id counts from 1 over both lists. The form does not say where one
instance of a role ends and the next begins, and has no server_ip: what is written and read again has one group a role.

Source: vllm-ascend, examples/disaggregate_prefill_v1 (gen_ranktable), and the connectors that read such files.
"""

from dataclasses import replace
from typing import Any, get_args

from ranktable.errors import SourceError, TableError
from ranktable.hccl_form import A3_VERSION, read_status
from ranktable.json_part import JsonPart
from ranktable.model import Device, Group, RankTable, Role, Server

_DEVICE_KEYS = ("server_id", "device_id", "device_ip", "super_pod_id", "super_device_id", "cluster_id", "rank_id")


def read(part: JsonPart) -> RankTable:
    """The table in a file's JSON object. Raises TableError with everything that is wrong with its fields."""
    if (version := part.text("version")) not in ("", A3_VERSION):
        part.wrong("version", f"{version!r} is not this form's", "write 1.2")
    status = read_status(part)
    groups = [_group(part, role, group_id) for group_id, role in enumerate(get_args(Role))]
    known = ("version", "server_count", "prefill_device_list", "decode_device_list", "status")
    table = RankTable(groups=tuple(groups), scope="global", status=status, extra=part.rest(*known), where=part.where)
    count, hosts = part.number_if_right("server_count", bare=True), len(table.server_ids)
    if count is not None and count < hosts:  # more: hosts whose devices nobody uses
        part.wrong("server_count", f"{count} is less than the {hosts} hosts in the lists", f'write "{hosts}"')
    if part.problems:
        raise TableError(part.problems)
    return table


def write(table: RankTable) -> dict[str, Any]:
    """What a file of this form holds, of a table that keeps the rules.

    cluster_ids are kept where every device has one; else all are numbered anew. Raises SourceError if a group has no
    role.
    """
    if nameless := [group for group in table.groups if group.role is None]:
        raise SourceError.of(
            f"group {nameless[0].group_id!r}", "is of no role, prefill or decode", "say how many groups are prefill's"
        )
    table = table if all(device.cluster_id is not None for _, _, device in table.devices) else _numbered(table)
    lists = {
        f"{role}_device_list": [
            _written_device(server, device)
            for group in table.groups
            if group.role == role
            for server, device in group.by_rank
        ]
        for role in get_args(Role)
    }
    head = {"version": A3_VERSION, "server_count": str(len(table.server_ids))}
    return head | lists | {"status": table.status}


def _numbered(table: RankTable) -> RankTable:
    """With cluster_ids from 1: prefill's devices first, by group and rank."""
    order = [device for role in get_args(Role) for group in table.groups if group.role == role
             for _, device in group.by_rank]  # fmt: skip
    number = {id(device): index for index, device in enumerate(order, start=1)}
    groups = tuple(
        replace(
            group,
            servers=tuple(
                replace(
                    server, devices=tuple(replace(device, cluster_id=number[id(device)]) for device in server.devices)
                )
                for server in group.servers
            ),
        )
        for group in table.groups
    )
    return replace(table, groups=groups)


def _group(part: JsonPart, role: Role, group_id: int) -> Group:
    key = f"{role}_device_list"
    devices: dict[str, list[Device]] = {}
    first_of: dict[str, JsonPart] = {}
    items = part.parts(key)
    if part.value.get(key) == []:
        part.wrong(key, "has no device", f"add the devices that do {role}")
    for rank, item in enumerate(items):
        server_id = item.text("server_id")
        first = first_of.setdefault(server_id, item)
        if item.value.get("super_pod_id") != first.value.get("super_pod_id"):
            what = f"{item.value.get('super_pod_id')!r} is not what {first.where} says of the same server"
            item.wrong("super_pod_id", what, "write the Super Pod ID that npu-smi shows")
        devices.setdefault(server_id, []).append(_device(item, rank))
    servers = [
        Server(
            server_id=server_id,
            super_pod_id=first.text("super_pod_id") if first.has("super_pod_id") else None,
            devices=tuple(devices[server_id]),
            where=first.where,
        )
        for server_id, first in first_of.items()
    ]
    return Group(group_id=str(group_id), servers=tuple(servers), role=role, where=part.path(key))


def _device(part: JsonPart, rank: int) -> Device:
    if part.has("super_device_id") != part.has("super_pod_id"):
        part.wrong("super_device_id", "and super_pod_id belong together", "write both (A3) or neither (A2)")
    return Device(
        device_id=part.number("device_id", bare=True),
        device_ip=part.address("device_ip"),
        rank_id=part.number("rank_id", bare=True) if part.has("rank_id") else rank,
        super_device_id=part.number("super_device_id", bare=True) if part.has("super_device_id") else None,
        cluster_id=part.number("cluster_id", bare=True),
        extra=part.rest(*_DEVICE_KEYS),
        where=part.where,
    )


def _written_device(server: Server, device: Device) -> dict[str, Any]:
    written = {"server_id": server.server_id, "device_id": str(device.device_id), "device_ip": device.device_ip}
    if device.super_device_id is not None:
        assert server.super_pod_id is not None, "a rule has seen to it"
        written |= {"super_pod_id": server.super_pod_id, "super_device_id": str(device.super_device_id)}
    written["cluster_id"] = str(device.cluster_id)
    return written | {**device.extra, **written}
