"""A rank table, whatever form it is written in.

A table has groups (instances: one for each prefill or decode engine), a group has servers (hosts, or pods on them), a
server has devices (NPU chips). Ranks count from 0 within a group, across its servers. `where` says which file and field
a part was read from; it is for messages, and no part of what a table says. `extra` keeps the keys of a file that mean
nothing here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["completed", "initializing"]  # initializing: whoever writes the table is not done
Role = Literal["prefill", "decode"]
Scope = Literal["local", "global"]  # the table of one group, or of all

NO_DEVICE = 0xFFFFFFFF  # what HCCL and the driver take for "no super pod device"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One NPU chip.

    device_id is the chip's number on its host, device_ip its address in the device network (A2: of its own network
    port; A3: the virtual one inside of the super pod). A3 alone: super_device_id, unique in its super pod.
    """

    device_id: int
    device_ip: str
    rank_id: int
    super_device_id: int | None = None
    cluster_id: int | None = None  # numbers the device among all of a deployment, from 1: vllm-ascend's form
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="device", compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One host, or one pod on it. `super_pod_id`: A3 alone."""

    server_id: str
    devices: tuple[Device, ...]
    server_ip: str | None = None
    super_pod_id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="server", compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One instance. `role`: where the form, or whoever merged the table, says it."""

    group_id: str
    servers: tuple[Server, ...]
    role: Role | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="group", compare=False, repr=False)

    @property
    def by_rank(self) -> list[tuple[Server, Device]]:
        """Every device with its server, in the order of ranks."""
        return sorted(
            ((server, device) for server in self.servers for device in server.devices),
            key=lambda pair: pair[1].rank_id,
        )


@dataclass(frozen=True, kw_only=True)
class RankTable:
    groups: tuple[Group, ...]
    scope: Scope
    status: Status = "completed"
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="table: ", compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.scope == "global" or len(self.groups) == 1, "a local table is of one group"

    @property
    def devices(self) -> Iterator[tuple[Group, Server, Device]]:
        """Every device with its group and server, as they stand in the file."""
        for group in self.groups:
            for server in group.servers:
                for device in server.devices:
                    yield group, server, device

    @property
    def has_super_pods(self) -> bool:
        """True on A3."""
        return any(device.super_device_id is not None for _, _, device in self.devices)

    @property
    def server_ids(self) -> list[str]:
        """Of all hosts, each once."""
        return list(dict.fromkeys(server.server_id for group in self.groups for server in group.servers))
