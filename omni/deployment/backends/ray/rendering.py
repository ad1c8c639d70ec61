"""What `serve` would ask of Ray, as a file for people: placement groups, actors, and the commands that these run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from omni.deployment.backends.ray.actors import engine_command, proxy_command
from omni.deployment.backends.ray.instances import engine_setups
from omni.deployment.backends.ray.placement import HEAD_NODE, PROXY, InstancePlan, instance_plans, namespace
from omni.deployment.backends.ray.proxy_setup import joined_proxies, proxy_setup
from omni.deployment.backends.ray.setup import EngineSetup, Meeting
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.plan_types import LaunchPlan

_HEADER: Final = """\
# What `omni_cli serve` asks of the Ray cluster. To be read: nothing reads it back. What Ray decides stands in <>.
# Ports are the first that are tried; an actor takes the next ones that are free on its node.
# A deployment file as the groups' actors write it is in {files}.
"""


def render(plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
    """Writes ray.yaml, and the deployment file of each group. Raises DeploymentError."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(zip(instance_plans(plan.deployment), group_settings(plan.deployment), strict=True))
    files = [_write_config(plan, instance, group, folder) for instance, group in groups]
    shown = {
        "address": plan.deployment.ray.address,
        "namespace": namespace(plan.name),
        "proxy": _proxy(plan),
        "placement_groups": [_placement_group(plan, instance, group) for instance, group in groups],
    }
    file = folder / "ray.yaml"
    header = _HEADER.format(files=", ".join(path.name for path in files))
    file.write_text(header + yaml.safe_dump(shown, sort_keys=False, width=120))
    return (file, *files)


def _proxy(plan: LaunchPlan) -> Mapping[str, Any]:
    setup = proxy_setup(plan, key="")
    paths = [f"<file {index} of the proxy's on its node>" for index in range(len(setup.secret_files))]
    return {
        "actor": PROXY,
        "resources": dict(HEAD_NODE),
        "num_cpus": 0,
        **_options(),
        "command": ["python", *proxy_command(setup, paths)],
    }


def _placement_group(plan: LaunchPlan, instance: InstancePlan, group: GroupSettings) -> Mapping[str, Any]:
    join = joined_proxies(plan, "<head node>")
    setups = engine_setups(plan.deployment, instance, group, join=join, key="")
    shown: dict[str, Any] = {
        "name": instance.name,
        "strategy": instance.strategy,
        "bundles": [dict(actor.bundle) for actor in instance.actors],
    }
    if instance.executor_devices:
        shown["reserved_by_vllm"] = {instance.device: instance.executor_devices}
    shown["actors"] = [
        {
            "name": actor.name,
            "bundle": actor.node,
            **_options(),
            "processes": list(actor.process_names),
            "command": ["python", *engine_command(setup, "<its deployment file>", "<node>", _meeting(setup))],
        }
        for actor, setup in zip(instance.actors, setups, strict=True)
    ]
    return shown


def _meeting(setup: EngineSetup) -> Meeting:
    return Meeting(address="<first node>", base_api_port=setup.first_api_port)


def _options() -> Mapping[str, Any]:
    return {"lifetime": "detached", "max_restarts": -1}


def _write_config(plan: LaunchPlan, instance: InstancePlan, group: GroupSettings, folder: Path) -> Path:
    (setup, *_) = engine_setups(plan.deployment, instance, group, join=(), key="")
    file = folder / f"{instance.name}.yaml"
    file.touch(mode=0o600)  # env may hold a secret of the user's
    file.write_text(yaml.safe_dump(dict(setup.config), sort_keys=False, width=120))
    return file
