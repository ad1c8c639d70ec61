"""The deployment file as the hosts get it: without secrets, and with what they cannot work out for themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from omni.deployment import strict_yaml
from omni.deployment.plan_types import LaunchPlan

_ACCESS: Final = ("user", "private_key", "password")  # of no use there
_HEADER: Final = "# Made from a deployment file, for its hosts: no passwords are in it, and the key is beside it.\n"


def copied_file(plan: LaunchPlan) -> str:
    """Its text."""
    data = strict_yaml.read(plan.config_file.read_text(encoding="utf-8")).data
    return _HEADER + yaml.safe_dump(_for_hosts(data, plan), sort_keys=False, allow_unicode=True)


def log_path(plan: LaunchPlan) -> Path:
    """On every host."""
    return plan.deployment.log_folder


def _for_hosts(data: Mapping[str, Any], plan: LaunchPlan) -> dict[str, Any]:
    services = {**data["services"], "log_path": str(log_path(plan))}
    if "kv_transfer" in services:
        services["kv_transfer"] = {k: v for k, v in services["kv_transfer"].items() if k != "key_file"}
    pools = {role: _without_access(block) for role, block in data["deployment"].items()}
    return {**data, "name": plan.name, "backend": "ansible", "deployment": pools, "services": services}


def _without_access(block: Any) -> Any:
    """A block without the keys for logging in, however deep they stand."""
    if not isinstance(block, dict):
        return block
    # env and the like are the user's own names
    return {
        key: value if key in ("env", "extra_args") else _without_access(value)
        for key, value in block.items()
        if key not in _ACCESS
    }
