"""Deployment → what Ray is asked for: placement groups, their bundles, the actors in them. Pure: asks no cluster.

A group is an instance: one placement group, a bundle and an actor for each of its nodes. Its `hosts` are counted and
no more than that: which nodes they become, Ray decides. Devices too are counted: which ones, Ray decides.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings, Pool, group_settings
from omni.deployment.model import Deployment, Platform
from omni.deployment.plan_types import LaunchPlan

PROXY: Final = "proxy"
HEAD_NODE: Final[Mapping[str, float]] = {"node:__internal_head__": 0.001}  # every head node has 1 of it
_DEVICE: Final[Mapping[Platform, str | None]] = {"cpu": None, "npu": "NPU", "cuda": "GPU"}


@dataclass(frozen=True, kw_only=True)
class ActorPlan:
    """What runs on one node of an instance."""

    name: str  # in the deployment's namespace: "prefill.group1"; "prefill.group1.node1" on a further node
    node: int  # of the instance, from 0
    num_ranks: int  # api servers
    bundle: Mapping[str, float]  # Ray resources that it reserves: {"NPU": 8, "CPU": 1}
    process_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class InstancePlan:
    """One prefill, decode or mixed group.

    `executor_devices` are those that vLLM's ray executor reserves itself, one bundle each, when the instance starts; 0
    where it computes without that executor.
    """

    role: Pool
    group: str
    strategy: str  # of the placement group
    actors: tuple[ActorPlan, ...]
    device: str | None  # "NPU", "GPU"; None: it computes on the CPU
    executor_devices: int = 0

    @property
    def name(self) -> str:
        """Its placement group's."""
        return f"{self.role}.{self.group}"

    @property
    def field(self) -> str:
        return f"deployment.{self.role}.{self.group}"


def namespace(deployment_name: str) -> str:
    return f"omni.{deployment_name}"


def instance_plans(deployment: Deployment) -> tuple[InstancePlan, ...]:
    """One for each group, in the file's order."""
    return tuple(_instance(group, deployment.effective_platform) for group in group_settings(deployment))


def ray_problems(plan: LaunchPlan) -> Iterator[Problem]:
    """What a deployment file may say, but not with this backend."""
    deployment = plan.deployment
    if plan.proxy.control_port is None:
        text = "0, and instances on a Ray cluster are found by their joining alone"
        yield Problem("deployment.proxy.control_port", text, "delete the line or write a port")
    for instance in instance_plans(deployment):
        if len({tuple(actor.bundle.items()) for actor in instance.actors}) > 1:
            text = "its hosts have different numbers of devices or ranks, and Ray's nodes change places"
            yield Problem(f"{instance.field}.hosts", text, "list as many devices for each, or split the group")
        if instance.device == "GPU" and any(actor.num_ranks > 1 for actor in instance.actors):
            text = "several DP ranks on one node cannot share out the GPUs that Ray gives to its actor"
            yield Problem(f"{instance.field}.data_parallel_size", text, "write 1, and one group for each rank")


def _instance(group: GroupSettings, platform: Platform) -> InstancePlan:
    device = _DEVICE[platform]
    common = {"role": group.role, "group": group.name, "device": device}
    if device is not None and _rank_spans_nodes(group):
        return InstancePlan(
            **common,  # type: ignore[arg-type]
            strategy="STRICT_PACK",
            actors=(_executor_driver(group),),
            executor_devices=group.data_parallel_size * group.num_workers,
        )
    actors = tuple(_actor(group, host, device) for host in group.hosts)
    strategy = "STRICT_PACK" if len(actors) == 1 else "STRICT_SPREAD"  # a node twice would be one host too few
    return InstancePlan(**common, strategy=strategy, actors=actors)  # type: ignore[arg-type]


def _rank_spans_nodes(group: GroupSettings) -> bool:
    return any(len(nodes) > 1 for nodes in group.ranks)


def _actor(group: GroupSettings, host: str, device: str | None) -> ActorPlan:
    node = group.hosts.index(host)
    parts = [(rank, index, part) for rank, nodes in enumerate(group.ranks) for index, part in enumerate(nodes)]
    here = [(rank, index) for rank, index, part in parts if part.host == host]
    num_workers = sum(group.num_workers // len(group.ranks[rank]) for rank, _ in here)
    return ActorPlan(
        name=f"{group.role}.{group.name}" + (f".node{node}" if node else ""),
        node=node,
        num_ranks=sum(index == 0 for _, index in here),
        bundle=_bundle(num_workers, len(here), device),
        process_names=tuple(_process_name(group, rank, index) for rank, index in here),
    )


def _executor_driver(group: GroupSettings) -> ActorPlan:
    """The api servers and EngineCores of all ranks: their workers are Ray actors of vLLM's own."""
    ranks = range(group.data_parallel_size)
    return ActorPlan(
        name=f"{group.role}.{group.name}",
        node=0,
        num_ranks=len(ranks),
        bundle={"CPU": float(len(ranks))},
        process_names=tuple(_process_name(group, rank, 0) for rank in ranks),
    )


def _bundle(num_workers: int, num_processes: int, device: str | None) -> Mapping[str, float]:
    """A core for each worker on a CPU; else a device for each, and a core for each process with its api server."""
    if device is None:
        return {"CPU": float(num_workers)}
    return {device: float(num_workers), "CPU": float(num_processes)}


def _process_name(group: GroupSettings, rank: int, node_rank: int) -> str:
    return f"{group.role}.{group.name}.rank{rank}" + (f".node{node_rank}" if node_rank else "")
