"""The table of one host, from its facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ranktable import hccn_conf
from ranktable.errors import SourceError
from ranktable.hccn_tool import DeviceAddress
from ranktable.model import Device, Group, RankTable, Server
from ranktable.sources import Source, read_text

Generation = Literal["a2", "a3"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the tools do not know. `devices`: those to use, in the order of their ranks; None: all."""

    server_id: str
    server_ip: str | None = None
    group_id: str = "0"
    devices: tuple[int, ...] | None = None


def from_source(host: Host, source: Source, generation: Generation) -> RankTable:
    """The table of the host's devices as `source` tells of them.

    Raises SourceError when it does not tell what the table needs.
    """
    chips = {chip.device_id: chip for chip in source.chips()}
    wanted = [chips[device_id] for device_id in _wanted(host, list(chips))]
    addresses = source.addresses(wanted, generation)
    for chip, address in zip(wanted, addresses, strict=True):
        if not address.is_up:
            mend = "bring it up, or leave the device out with --devices"
            raise SourceError.of(address.where, f"the link of device {chip.device_id} is down", mend)
    ids = [chip.device_id for chip in wanted]
    if generation == "a2":
        return _table(host, _devices(ids, addresses, [None] * len(ids)), None)
    pods = source.super_pod_chips(wanted)
    for pod in pods:
        if pod.super_pod_id != pods[0].super_pod_id:
            what = f"super pod {pod.super_pod_id}, but {pods[0].where} says {pods[0].super_pod_id}"
            raise SourceError.of(pod.where, what, "one host is in one super pod: give the output of one host")
    return _table(host, _devices(ids, addresses, [pod.super_device_id for pod in pods]), pods[0].super_pod_id)


def from_hccn_conf(host: Host, path: Path) -> RankTable:
    """The table of the devices in an A2 host's hccn.conf. Raises SourceError."""
    found = hccn_conf.parse(read_text(path), str(path))
    ids = _wanted(host, list(found))
    return _table(host, _devices(ids, [found[device_id] for device_id in ids], [None] * len(ids)), None)


def _wanted(host: Host, there: list[int]) -> list[int]:
    for device_id in host.devices or ():
        if device_id not in there:
            shown = ", ".join(map(str, there))
            raise SourceError.of("--devices", f"device {device_id} is not on this host", f"choose from {shown}")
    return there if host.devices is None else list(host.devices)


def _devices(
    ids: Sequence[int], addresses: Sequence[DeviceAddress], super_device_ids: Sequence[int | None]
) -> tuple[Device, ...]:
    return tuple(
        Device(
            device_id=device_id,
            device_ip=address.ip,
            rank_id=rank,
            super_device_id=super_device_id,
            where=f"{address.where} (device {device_id})",
        )
        for rank, (device_id, address, super_device_id) in enumerate(zip(ids, addresses, super_device_ids, strict=True))
    )


def _table(host: Host, devices: tuple[Device, ...], super_pod_id: str | None) -> RankTable:
    server = Server(server_id=host.server_id, server_ip=host.server_ip, devices=devices, super_pod_id=super_pod_id)
    return RankTable(groups=(Group(group_id=host.group_id, servers=(server,)),), scope="local")
