"""A deployment that is served anew from a changed file: what ran on hosts that are no more in it ends first."""

from pathlib import Path
from typing import Any

import yaml

from omni.deployment.backends import Say
from omni.deployment.backends.ansible.inventory import inventory_text
from omni.deployment.backends.ansible.playbook_run import run_playbook
from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan

_STOP = ("stop_server", "remove_docker")


def stop_what_left(rendered: Path, plan: LaunchPlan, say: Say, timeout_s: int) -> None:
    """Args:
    rendered: as it was rendered before; nothing happens if it was not.

    Raises:
        DeploymentError: it could not be stopped. Nothing else was done.
    """
    inventory = rendered / "inventory.yml"
    if not inventory.exists():
        return
    hosts = hosts_that_left(inventory.read_text(encoding="utf-8"), inventory_text(plan.deployment))
    if not hosts:
        return
    say(f"no more in the deployment file: {', '.join(hosts)}")
    outcome = run_playbook(rendered, tags=_STOP, hosts=hosts, say=say, timeout_s=timeout_s)
    if not outcome.is_good:
        raise DeploymentError(
            f"{plan.name} runs on hosts that are no more in {plan.config_file}, and could not be stopped:\n{outcome}\n"
            f"Write them back into the file and `omni_cli stop {plan.name}`, or mend them and serve again"
        )


def hosts_that_left(before: str, after: str) -> list[str]:
    """Names, as the inventory `before` has them, of hosts that had engines or the proxy and have none in `after`."""
    now = {place for _, place in _places(after)}
    return [name for name, place in _places(before) if place not in now]


def _places(inventory: str) -> list[tuple[str, tuple[str, bool]]]:
    """Each host's name, address and whether it is the proxy."""
    groups: dict[str, Any] = yaml.safe_load(inventory)["all"]["children"]
    return [
        (name, (variables["ansible_host"], letter == "C"))
        for letter in ("P", "D", "M", "C")
        for name, variables in (groups[letter]["hosts"] or {}).items()
    ]
