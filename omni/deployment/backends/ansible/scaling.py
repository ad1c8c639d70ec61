"""More or fewer groups of a role while the deployment runs: those of the deployment file, the first so many of each.

Whole machines are started and stopped: a group that shares one with a group that stays, stays.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from omni.deployment.backends import Say
from omni.deployment.backends.ansible.machines import inventory_hosts, machines_of
from omni.deployment.backends.ansible.playbook_run import Outcome, run_playbook
from omni.deployment.errors import ConfigError, DeploymentError, Problem
from omni.deployment.groups import Pool
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState, RunFolder

_START_TIMEOUT_S: Final = 3600
_STOP_TIMEOUT_S: Final = 300
_JOIN_S: Final = 5.0
_POLL_S: Final = 0.3


class Scaling:
    """One change of a running deployment."""

    def __init__(self, state: DeploymentState, rendered: Path, say: Say) -> None:
        self._state = state
        self._rendered = rendered
        self._say = say
        self._plan = load_plan(Path(state.config_file))
        self._client = ProxyAccess.of(state).admin_client()

    def to(self, num_groups: Mapping[Pool, int], wait_s: float) -> None:
        """New groups first, so that there is always somebody to take requests. Raises DeploymentError."""
        wanted = wanted_names(self._plan, self._state.process_names, num_groups)
        new = [p for p in self._plan.engines if p.name in wanted and p.name not in self._state.process_names]
        gone = [p for p in self._plan.engines if p.name not in wanted and p.name in self._state.process_names]
        new_hosts = whole_machines(self._plan, [process.name for process in new], self._state.process_names)
        gone_hosts = whole_machines(self._plan, [process.name for process in gone], wanted)
        if new:
            self._start(new, new_hosts)
        if gone:
            self._end(gone, gone_hosts, wait_s)
        self._say(f"{len(new)} processes started, {len(gone)} stopped")

    def _start(self, new: Sequence[ProcessPlan], hosts: Sequence[str]) -> None:
        tags = ("run_docker", "sync_code", "pip_install", "run_server")
        outcome = run_playbook(self._rendered, tags=tags, hosts=hosts, say=self._say, timeout_s=_START_TIMEOUT_S)
        if not outcome.is_good:
            self._stop(hosts)
            raise DeploymentError(f"the new groups did not start, and are stopped again:\n{outcome}")
        names = {process.name for process in new} | {*self._state.process_names}
        self._write([process.name for process in self._plan.processes if process.name in names])
        for process in self._not_joined(new):
            self._client.add(process.role, process.url)

    def _end(self, gone: Sequence[ProcessPlan], hosts: Sequence[str], wait_s: float) -> None:
        for process in gone:
            if not process.is_headless:
                self._say(f"{process.name} drains")
                self._client.remove(_instance_name(process), wait_s)
        outcome = self._stop(hosts)
        if not outcome.is_good:
            raise DeploymentError(f"drained, but not stopped everywhere; ask again:\n{outcome}")
        names = {process.name for process in gone}
        self._write([name for name in self._state.process_names if name not in names])

    def _stop(self, hosts: Sequence[str]) -> Outcome:
        return run_playbook(self._rendered, tags=("stop_server",), hosts=hosts, timeout_s=_STOP_TIMEOUT_S)

    def _not_joined(self, engines: Sequence[ProcessPlan]) -> list[ProcessPlan]:
        """Those whose agents, if they have any, have not joined the proxy after some seconds."""
        deadline_s = time.monotonic() + _JOIN_S
        while True:
            known = {instance["name"] for instance in self._client.instances()}
            missing = [p for p in engines if not p.is_headless and _instance_name(p) not in known]
            if not missing or time.monotonic() > deadline_s:
                return missing
            time.sleep(_POLL_S)

    def _write(self, process_names: Sequence[str]) -> None:
        self._state = replace(self._state, process_names=tuple(process_names))
        RunFolder.of(self._state.name).write_deployment(self._state)


def wanted_names(plan: LaunchPlan, present: Sequence[str], num_groups: Mapping[Pool, int]) -> set[str]:
    """The processes that there shall be. Raises ConfigError."""
    wanted = set(present)
    for role, number in num_groups.items():
        groups = list(dict.fromkeys(process.group for process in plan.engines if process.role == role))
        if not 1 <= number <= len(groups):
            text = f"the deployment file has {len(groups)} {role} groups"
            mend = f"write 1 to {len(groups)}, or add the group there and serve it" if groups else "leave it out"
            raise ConfigError([Problem(f"{role}={number}", text, mend)])
        wanted -= {process.name for process in plan.engines if process.role == role}
        wanted |= {p.name for p in plan.engines if p.role == role and p.group in groups[:number]}
    return wanted


def whole_machines(plan: LaunchPlan, names: Sequence[str], others: Sequence[str] | set[str]) -> list[str]:
    """The inventory's hosts that run these processes, and none of `others`. Raises DeploymentError."""
    acts_for = {machine.first.address: machine.first.name for machine in machines_of(inventory_hosts(plan.deployment))}
    addresses = dict.fromkeys(process.host for process in plan.engines if process.name in names)
    for address in addresses:
        if shared := [p.name for p in plan.engines if p.host == address and p.name in others]:
            raise DeploymentError(
                f"{address} runs {', '.join(shared)}, too, and a machine's engines start and stop together: "
                "take groups that have machines of their own"
            )
    return [acts_for[address] for address in addresses]


def _instance_name(process: ProcessPlan) -> str:
    return f"{process.host}:{process.port}".lower()
