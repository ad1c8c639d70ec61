"""HCCL's form: a `server_list` for one group, a `server_group_list` of such for all.

    {"version": "1.0", "status": "completed", "group_id": "0", "server_count": "1", "server_list": [
        {"server_id": "10.0.0.1", "server_ip": "10.0.0.1", "device": [
            {"device_id": "0", "device_ip": "192.168.1.8", "rank_id": "0"}]}]}

    {"version": "1.0", "status": "completed", "server_group_list": [
        {"group_id": "0", "server_count": "1", "server_list": [...]}]}

Version 1.2 is for A3: each device has a `super_device_id` as well, and beside each server_list stands a super_pod_list,
[{"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.1"}]}]. All numbers are text.

Sources: HCCL's user guide for server_list and super_pod_list; MindCluster's "global-ranktable" and "hccl.json" pages
for server_group_list, both at https://www.hiascend.com/document; OmniInfer's local tables have group_id and server_ip,
too. HCCL's own files lack them: group_id is then "0".
"""

from typing import Any, get_args

from ranktable.errors import TableError
from ranktable.json_part import JsonPart
from ranktable.model import Device, Group, RankTable, Scope, Server, Status

A2_VERSION, A3_VERSION = "1.0", "1.2"

_STATUSES: tuple[Status, ...] = get_args(Status)


def read(part: JsonPart) -> RankTable:
    """The table in a file's JSON object. Raises TableError with everything that is wrong with its fields."""
    version = part.text("version")
    if version not in ("", A2_VERSION, A3_VERSION):
        part.wrong("version", f"{version!r} is not known", "write 1.0 for A2 or 1.2 for A3")
    if part.problems:  # which keys a table has depends on its version
        raise TableError(part.problems)
    status = read_status(part)
    with_pods = version == A3_VERSION
    scope: Scope = "global" if part.has("server_group_list") else "local"
    if scope == "global":
        groups = [_group(group, with_pods, group.text("group_id")) for group in part.parts("server_group_list")]
        extra = part.rest("version", "status", "server_group_list")
    else:
        group_id = part.text("group_id") if part.has("group_id") else "0"
        groups, extra = [_group(part, with_pods, group_id)], {}
    if part.problems:
        raise TableError(part.problems)
    return RankTable(groups=tuple(groups), scope=scope, status=status, extra=extra, where=part.where)


def read_status(part: JsonPart) -> Status:
    status = part.text("status")
    for known in _STATUSES:
        if status == known:
            return known
    if status:
        part.wrong("status", f"{status!r} is not known", "write completed, or initializing while it is not")
    return "completed"


def write(table: RankTable) -> dict[str, Any]:
    """What a file of this form holds, of a table that keeps the rules."""
    head = {"version": A3_VERSION if table.has_super_pods else A2_VERSION, "status": table.status}
    groups = [_written_group(group, table.has_super_pods) for group in table.groups]
    written: dict[str, Any] = head | (groups[0] if table.scope == "local" else {"server_group_list": groups})
    return written | {**table.extra, **written}


def _group(part: JsonPart, with_pods: bool, group_id: str) -> Group:
    server_parts = part.parts("server_list")
    count = part.number_if_right("server_count")
    servers = part.value.get("server_list")
    if count is not None and isinstance(servers, list) and count != len(servers):
        what = f"'{count}', but server_list has {len(servers)}"
        part.wrong("server_count", what, f'write "server_count": "{len(servers)}"')
    pods = _super_pods(part, server_parts) if with_pods else {}
    if not with_pods and part.has("super_pod_list"):
        part.wrong("super_pod_list", "is not for version 1.0", 'write "version": "1.2", or drop it')
    known = ("version", "status", "group_id", "server_count", "server_list", "super_pod_list")
    return Group(
        group_id=group_id,
        servers=tuple(_server(server, pods, with_pods) for server in server_parts),
        extra=part.rest(*known),
        where=part.where,
    )


def _super_pods(part: JsonPart, server_parts: list[JsonPart]) -> dict[str, str]:
    """server_id → super_pod_id, for every server of the group."""
    pods: dict[str, str] = {}
    server_ids = [server.value.get("server_id") for server in server_parts]
    servers = {name: server for name, server in zip(server_ids, server_parts, strict=True) if isinstance(name, str)}
    for pod in part.parts("super_pod_list"):
        pod_id = pod.text("super_pod_id")
        for member in pod.parts("server_list"):
            server_id = member.text("server_id")
            if not server_id:
                continue
            if server_id not in servers:
                member.wrong("server_id", f"{server_id!r} is not in server_list", "drop it, or add the server")
            elif server_id in pods:
                member.wrong("server_id", f"{server_id!r} is in a super pod already", "write each server once")
            else:
                pods[server_id] = pod_id
    if part.has("super_pod_list"):
        for server_id, server in servers.items():
            if server_id not in pods:
                server.wrong("server_id", f"{server_id!r} is not in super_pod_list", "add it to its super pod")
    return pods


def _server(part: JsonPart, pods: dict[str, str], with_pods: bool) -> Server:
    server_id = part.text("server_id")
    return Server(
        server_id=server_id,
        server_ip=part.address("server_ip") if part.has("server_ip") else None,
        super_pod_id=pods.get(server_id),
        devices=tuple(_device(device, with_pods) for device in part.parts("device")),
        extra=part.rest("server_id", "server_ip", "device"),
        where=part.where,
    )


def _device(part: JsonPart, with_pods: bool) -> Device:
    if not with_pods and part.has("super_device_id"):
        part.wrong("super_device_id", "is not for version 1.0", 'write "version": "1.2", or drop it')
    return Device(
        device_id=part.number("device_id"),
        device_ip=part.address("device_ip"),
        rank_id=part.number("rank_id"),
        super_device_id=part.number("super_device_id") if with_pods else None,
        cluster_id=part.number("cluster_id") if part.has("cluster_id") else None,
        extra=part.rest("device_id", "device_ip", "rank_id", "super_device_id", "cluster_id"),
        where=part.where,
    )


def _written_group(group: Group, with_pods: bool) -> dict[str, Any]:
    written: dict[str, Any] = {
        "group_id": group.group_id,
        "server_count": str(len(group.servers)),
        "server_list": [_written_server(server) for server in group.servers],
    }
    if with_pods:
        pods: dict[str, list[dict[str, str]]] = {}
        for server in group.servers:
            assert server.super_pod_id is not None, "a rule has seen to it"
            pods.setdefault(server.super_pod_id, []).append({"server_id": server.server_id})
        written["super_pod_list"] = [{"super_pod_id": pod, "server_list": members} for pod, members in pods.items()]
    return written | {**group.extra, **written}


def _written_server(server: Server) -> dict[str, Any]:
    written: dict[str, Any] = {"server_id": server.server_id}
    if server.server_ip is not None:
        written["server_ip"] = server.server_ip
    written["device"] = [_written_device(device) for device in server.devices]
    return written | {**server.extra, **written}


def _written_device(device: Device) -> dict[str, Any]:
    written = {"device_id": str(device.device_id), "device_ip": device.device_ip}
    if device.super_device_id is not None:
        written["super_device_id"] = str(device.super_device_id)
    written["rank_id"] = str(device.rank_id)
    if device.cluster_id is not None:
        written["cluster_id"] = str(device.cluster_id)
    return written | {**device.extra, **written}
