"""Tables for the tests, as the JSON that files hold."""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def a2_local(host: str = "10.0.0.1", first_ip: int = 8, num_devices: int = 2, group_id: str = "0") -> Json:
    devices = [
        {"device_id": str(i), "device_ip": f"192.168.1.{first_ip + i}", "rank_id": str(i)} for i in range(num_devices)
    ]
    return {
        "version": "1.0",
        "status": "completed",
        "group_id": group_id,
        "server_count": "1",
        "server_list": [{"server_id": host, "server_ip": host, "device": devices}],
    }


def a3_local(host: str = "10.0.0.1", first: int = 0, pod: str = "0", num_devices: int = 2) -> Json:
    devices = [
        {
            "device_id": str(i),
            "device_ip": f"192.168.2.{1 + first + i}",
            "super_device_id": str(100663296 + first + i),
            "rank_id": str(i),
        }
        for i in range(num_devices)
    ]
    return {
        "version": "1.2",
        "status": "completed",
        "group_id": "0",
        "server_count": "1",
        "server_list": [{"server_id": host, "server_ip": host, "device": devices}],
        "super_pod_list": [{"super_pod_id": pod, "server_list": [{"server_id": host}]}],
    }


def a2_global() -> Json:
    groups = [a2_local(f"10.0.0.{1 + i}", 8 + 2 * i, group_id=str(i)) for i in range(3)]
    for group in groups:
        del group["version"], group["status"]
    return {"version": "1.0", "status": "completed", "server_group_list": groups}


def device_lists(*, super_pods: bool) -> Json:
    def device(host: int, chip: int) -> Json:
        number = 2 * host + chip
        head = {"server_id": f"10.0.0.{1 + host}", "device_id": str(chip), "device_ip": f"192.168.1.{8 + number}"}
        pod = {"super_pod_id": "0", "super_device_id": str(100663296 + number)} if super_pods else {}
        return head | pod | {"cluster_id": str(1 + number)}

    return {
        "version": "1.2",
        "server_count": "3",
        "prefill_device_list": [device(host, chip) for host in (0, 1) for chip in (0, 1)],
        "decode_device_list": [device(2, chip) for chip in (0, 1)],
        "status": "completed",
    }


def put(folder: Path, name: str, value: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
