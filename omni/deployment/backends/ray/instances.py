"""Instances of one deployment on a cluster: reserved, started, watched, ended."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from omni.deployment.backends import Say
from omni.deployment.backends.ray import cluster as ray_cluster
from omni.deployment.backends.ray.actors import STOP_TIMEOUT_S, EngineActor
from omni.deployment.backends.ray.capacity import instance_need, shown
from omni.deployment.backends.ray.cluster import Cluster
from omni.deployment.backends.ray.node_files import clean_node, group_config
from omni.deployment.backends.ray.placement import PROXY, InstancePlan, namespace
from omni.deployment.backends.ray.setup import EngineSetup
from omni.deployment.errors import DeploymentError, MachineError, Problem
from omni.deployment.groups import GroupSettings
from omni.deployment.model import Deployment
from omni.deployment.run_state import ProcessState

POLL_S: Final = 0.5
_LAST_LINES: Final = 12
_CLEAN_S: Final = 20.0
_LOGS_S: Final = 60.0


def engine_setups(
    deployment: Deployment, instance: InstancePlan, group: GroupSettings, *, join: tuple[str, ...], key: str
) -> tuple[EngineSetup, ...]:
    """One for each actor of the instance."""
    uses_executor = instance.executor_devices > 0
    config = group_config(deployment, group, uses_executor=uses_executor)
    return tuple(
        EngineSetup(
            namespace=namespace(deployment.name),
            actor_name=actor.name,
            role=instance.role,
            group=instance.group,
            node=actor.node,
            num_ranks=actor.num_ranks,
            num_cores=int(actor.bundle["CPU"]) if instance.device is None else 0,
            process_names=actor.process_names,
            master=instance.actors[0].name if actor.node else None,
            is_spread=len(instance.actors) > 1,
            first_api_port=group.base_api_port(group.hosts[0]),
            join=join,
            config=config,
            key=key,
        )
        for actor in instance.actors
    )


def reserve(cluster: Cluster, instances: Sequence[InstancePlan], timeout_s: float) -> None:
    """Take all bundles; none of them, when some cannot be had in time.

    Raises:
        MachineError: which groups wait, and for what.
    """
    largest_first = sorted(instances, key=lambda instance: -max(sum(a.bundle.values()) for a in instance.actors))
    groups = {cluster.reserve(instance, _driver_node(cluster, instance)): instance for instance in largest_first}
    waiting = [groups[group] for group in ray_cluster.wait(list(groups), timeout_s)]
    if not waiting:
        return
    free = {name: number for name, number in cluster.free().items() if name in ("CPU", "NPU", "GPU")}
    for instance in instances:
        cluster.release(instance.name)
    problems = [
        Problem(
            instance.field,
            f"{shown(instance_need(instance))} on {len(instance.actors)} node(s) were not to be had within "
            f"{timeout_s:g} s (free in all: {shown(free) or 'nothing'})",
            "end what else runs on the cluster (`ray status`), add nodes, or ask for less; nothing was started",
        )
        for instance in waiting
    ]
    raise MachineError(problems)


def start(cluster: Cluster, instance: InstancePlan, setups: Iterable[EngineSetup]) -> None:
    for actor, setup in zip(instance.actors, setups, strict=True):
        cluster.start_engines(EngineActor, setup, actor)


def end(cluster: Cluster, actor_names: Sequence[str], instance_names: Iterable[str]) -> None:
    """Stop programs, then kill their actors and give the bundles back."""
    actors = {name: actor for name in actor_names if (actor := cluster.actor(name)) is not None}
    ray_cluster.ask(actors, "stop", STOP_TIMEOUT_S + 15)
    for name in actor_names:
        cluster.kill(name)
    for name in instance_names:
        cluster.release(name)


def end_all(cluster: Cluster, deployment_name: str, instance_names: Iterable[str]) -> None:
    """Leave nothing of the deployment on the cluster. Engines first: they take their leave of the proxy."""
    names = cluster.actor_names()
    end(cluster, [name for name in names if name != PROXY], instance_names)
    end(cluster, [name for name in names if name == PROXY], ())
    cluster.on_each_node(clean_node, namespace(deployment_name), timeout_s=_CLEAN_S)


def process_states(cluster: Cluster, names: Sequence[str]) -> list[ProcessState]:
    """In the order of `names`."""
    actors = _actors(cluster)
    found = {}
    for states in ray_cluster.ask(actors, "states").values():
        found.update({state["name"]: ProcessState(**state) for state in states})
    lost = ProcessState(name="", state="restarting", message="its actor does not answer; Ray starts it again")
    gone = ProcessState(name="", state="stopped", message="it has no actor")
    return [found.get(name) or replace(lost if instance_of(name, actors) else gone, name=name) for name in names]


def wait_until_ready(cluster: Cluster, names: Sequence[str], timeout_s: float, say: Say) -> None:
    """Raises DeploymentError: one has failed, with the end of its log; or time is up, with what is pending."""
    deadline_s = time.monotonic() + timeout_s
    told: set[str] = set()
    while True:
        states = process_states(cluster, names)
        for state in states:
            if state.state == "ready" and state.name not in told:
                told.add(state.name)
                say(f"{state.name} is ready on {state.host}")
        if len(told) == len(names) and all(state.state == "ready" for state in states):
            return
        _raise_failure(cluster, states)
        if time.monotonic() > deadline_s:
            pending = "; ".join(f"{s.name}: {s.message or s.stage or s.state}" for s in states if s.state != "ready")
            raise DeploymentError(f"not ready after {timeout_s:g} s: {pending}")
        time.sleep(POLL_S)


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises DeploymentError when time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise DeploymentError(f"{what} took more than {timeout_s:g} s: see `omni_cli status`")
        time.sleep(POLL_S)


def fetch_logs(cluster: Cluster, folder: Path) -> None:
    """As far as actors answer. A log of an earlier life on another node stays there until the deployment is stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    for logs in ray_cluster.ask(_actors(cluster), "logs", _LOGS_S).values():
        for name, text in logs.items():
            (folder / name).write_bytes(text)


def instance_of(process_name: str, instance_names: Iterable[str]) -> str | None:
    """Of instances or actors ("prefill.group1"), the one that a process ("prefill.group1.rank0") is of; or itself."""
    wanted = ".".join(process_name.split(".")[:2])
    return next((name for name in instance_names if ".".join(name.split(".")[:2]) == wanted), None)


def instance_names(process_names: Iterable[str]) -> list[str]:
    """Each once; without the proxy."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in process_names if name != PROXY))


def _actors(cluster: Cluster) -> Mapping[str, Any]:
    return {name: actor for name in cluster.actor_names() if (actor := cluster.actor(name)) is not None}


def _raise_failure(cluster: Cluster, states: Sequence[ProcessState]) -> None:
    actors = _actors(cluster)
    failures = [name for name, number in ray_cluster.ask(actors, "num_failures").items() if number]
    failed = [s.name for s in states if s.state == "failed" or instance_of(s.name, failures) is not None]
    if not failed:
        return
    logs: dict[str, bytes] = {}
    for answer in ray_cluster.ask(actors, "logs", _LOGS_S).values():
        logs.update(answer)
    name = next((f for f in (failed[0], ".".join(failed[0].split(".")[:2])) if logs.get(f"{f}.log")), failed[0])
    lines = logs.get(f"{name}.log", b"").decode(errors="replace").splitlines()[-_LAST_LINES:]
    raise DeploymentError("\n".join([f"{', '.join(failed)} failed to start; the end of {name}'s log:", *lines]))


def _driver_node(cluster: Cluster, instance: InstancePlan) -> Mapping[str, float]:
    """Where vLLM's ray executor does the work, the api server must be on a node with such a device: vLLM insists."""
    if not instance.executor_devices or instance.device is None:
        return {}
    node = max(cluster.nodes(), key=lambda resources: resources.get(instance.device or "", 0))
    address = next(name for name in node if name.startswith("node:") and "internal" not in name)
    return {address: 0.001}
