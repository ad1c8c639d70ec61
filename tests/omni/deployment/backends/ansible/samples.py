"""Deployment files on several hosts, and their plans."""

from pathlib import Path
from typing import Any

import yaml

from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan


def content(**services: Any) -> dict[str, Any]:
    """1P1D with four hosts: P, D on two, the proxy; on NPUs, in containers."""
    key = {"user": "root", "private_key": "/keys/id"}
    return {
        "name": "sample",
        "deployment": {
            "prefill": {
                "group1": {**key, "hosts": "10.0.0.1", "base_api_port": 9000, "ascend_rt_visible_devices": "0,1"}
            },
            "decode": {
                "group1": {
                    "user": "admin",
                    "password": "pa{{ss}}word",
                    "base_api_port": 9100,
                    "hosts": "10.0.0.2,10.0.0.3",
                    "ascend_rt_visible_devices": "0,1,2,3",
                    "host 10.0.0.3": {"private_key": "/keys/other", "ascend_rt_visible_devices": "4,5,6,7"},
                }
            },
            "proxy": {**key, "host": "10.0.0.4", "listen_port": 7000},
        },
        "services": {
            "model_path": "/models/m",
            "log_path": "/logs",
            "docker_image": "image:1",
            **services,
        },
    }


def plan_of(folder: Path, data: dict[str, Any]) -> LaunchPlan:
    file = folder / "sample.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_plan(file)
