"""More or fewer groups of a role while the deployment runs on a cluster.

A new group is the one of that name in the deployment file, or a copy of the role's first group. Groups end from the
last, drained through the proxy first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Final

from kv_transfer.auth import default_key_path
from omni.deployment.backends import Say
from omni.deployment.backends.ray import instances
from omni.deployment.backends.ray.capacity import capacity_problems
from omni.deployment.backends.ray.cluster import Cluster, ask
from omni.deployment.backends.ray.placement import PROXY, InstancePlan, instance_plans
from omni.deployment.backends.ray.proxy_setup import joined_proxies
from omni.deployment.errors import ConfigError, MachineError, Problem, raise_any
from omni.deployment.groups import GroupSettings, Pool, group_settings
from omni.deployment.load import load_plan
from omni.deployment.model import Deployment, Group
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState, RunFolder

_JOIN_S: Final = 60.0


class Scaling:
    """One change of a running deployment."""

    def __init__(self, cluster: Cluster, state: DeploymentState, reserve_s: float, start_s: float, say: Say) -> None:
        self._cluster = cluster
        self._state = state
        self._reserve_s = reserve_s
        self._start_s = start_s
        self._say = say
        self._plan: LaunchPlan = load_plan(Path(state.config_file))
        self._key_file = self._plan.key_file or default_key_path()
        self._client = ProxyAccess.of(state).admin_client()

    def to(self, num_groups: Mapping[Pool, int], wait_s: float) -> None:
        """Raises DeploymentError: it cannot be done; new groups that did not come up are ended again."""
        present = instances.instance_names(self._state.process_names)
        new, gone = changes(present, num_groups)
        if new:
            self._add(new)
        for name in gone:
            self._remove(name, wait_s)
        self._say(f"{len(new)} groups started, {len(gone)} stopped")

    def _add(self, names: Sequence[str]) -> None:
        deployment = with_groups(self._plan.deployment, names)
        planned = [
            (instance, group)
            for instance, group in zip(instance_plans(deployment), group_settings(deployment), strict=True)
            if instance.name in names
        ]
        new = [instance for instance, _ in planned]
        raise_any(capacity_problems(new, self._cluster.nodes()), MachineError)
        before = self._state
        processes = [name for instance in new for actor in instance.actors for name in actor.process_names]
        instances.reserve(self._cluster, new, self._reserve_s)
        self._write([*before.process_names[:-1], *processes, PROXY])
        try:
            self._start(deployment, planned)
            instances.wait_until_ready(self._cluster, processes, self._start_s, self._say)
            instances.wait_until(lambda: self._have_joined(new), _JOIN_S, "joining the proxy")
        except BaseException:
            self._say("the new groups did not start: they are stopped again")
            for instance in new:
                instances.end(self._cluster, [actor.name for actor in instance.actors], [instance.name])
            self._write(before.process_names)
            raise

    def _start(self, deployment: Deployment, planned: Sequence[tuple[InstancePlan, GroupSettings]]) -> None:
        key = self._key_file.read_text(encoding="ascii").strip()
        join = joined_proxies(self._plan, self._cluster.head_address())
        for instance, group in planned:
            setups = instances.engine_setups(deployment, instance, group, join=join, key=key)
            instances.start(self._cluster, instance, setups)

    def _have_joined(self, new: Sequence[InstancePlan]) -> bool:
        known = {instance["name"] for instance in self._client.instances()}
        return all(set(self._endpoints(instance.name)) <= known for instance in new)

    def _remove(self, name: str, wait_s: float) -> None:
        self._say(f"{name} drains")
        for endpoint in self._endpoints(name):
            self._client.remove(endpoint, wait_s)
        actor_names = [actor for actor in self._cluster.actor_names() if instances.instance_of(actor, [name])]
        instances.end(self._cluster, actor_names, [name])
        self._write([process for process in self._state.process_names if not instances.instance_of(process, [name])])

    def _endpoints(self, name: str) -> list[str]:
        names = [actor for actor in self._cluster.actor_names() if instances.instance_of(actor, [name])]
        actors = {actor: self._cluster.actor(actor) for actor in names}
        return [endpoint for endpoints in ask(actors, "endpoints").values() for endpoint in endpoints]

    def _write(self, process_names: Sequence[str]) -> None:
        self._state = replace(self._state, process_names=tuple(process_names))
        RunFolder.of(self._state.name).write_deployment(self._state)


def changes(present: Sequence[str], num_groups: Mapping[Pool, int]) -> tuple[list[str], list[str]]:
    """Names ("decode.group2") of groups to start, and of groups to end.

    Raises:
        ConfigError: a role would be left without a group.
    """
    new: list[str] = []
    gone: list[str] = []
    for role, number in num_groups.items():
        names = [name for name in present if name.startswith(f"{role}.")]
        if not names:
            raise ConfigError([Problem(f"{role}={number}", f"the deployment has no {role} groups", "leave it out")])
        if number < 1:
            raise ConfigError([Problem(f"{role}={number}", "a deployment has one of each", "write 1 or more")])
        free = (name for n in count(1) if (name := f"{role}.group{n}") not in names)
        new += [next(free) for _ in range(number - len(names))]
        gone += reversed(names[number:])
    return new, gone


def with_groups(deployment: Deployment, names: Sequence[str]) -> Deployment:
    """The deployment with groups of these names, too: as the file has them, else like the role's first."""
    pools: dict[str, dict[str, Group]] = {}
    for name in names:
        role, _, group = name.partition(".")
        pool = pools.setdefault(role, dict(getattr(deployment.deployment, role)))
        first = next(iter(pool.values()))
        hosts = tuple(f"{role}-{group}-{index}" for index in range(len(first.hosts)))  # counted: its own ports, devices
        pool.setdefault(group, first.model_copy(update={"hosts": hosts, "host_overrides": {}}))
    enlarged = deployment.deployment.model_copy(update=pools)
    return deployment.model_copy(update={"deployment": enlarged})
