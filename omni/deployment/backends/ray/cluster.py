"""One deployment's part of a Ray cluster: its namespace, placement groups and named actors.

Everything is detached: it outlives the command that has started it and is found again by its name. This process must be
on a node of the cluster.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read as Ray is imported: nothing of this is reported to anybody

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from omni.deployment.backends.ray.placement import HEAD_NODE, ActorPlan, InstancePlan, namespace
from omni.deployment.errors import DeploymentError

_START_ONE: Final = "start one with `ray start --head`, or write ray.address"
_MAX_CONCURRENCY: Final = 8  # of an actor: it answers while it stops its program
_QUESTION_S: Final = 5.0
_REACH_S: Final = 5.0


class NoClusterError(DeploymentError):
    """Nothing can be asked of the cluster."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"no Ray cluster answers at {address!r} ({reason}): {_START_ONE}")


class Cluster:
    """Made by `connected`."""

    def __init__(self, deployment_name: str) -> None:
        self._namespace = namespace(deployment_name)

    @property
    def address(self) -> str:
        """HOST:PORT under which it is found again from any of its nodes."""
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Mapping[str, float]]:
        """What each living node has in all, free or not."""
        return [node["Resources"] for node in _nodes() if node["Alive"]]

    def head_address(self) -> str:
        for node in _nodes():
            if node["Alive"] and HEAD_NODE.keys() <= node["Resources"].keys():
                return str(node["NodeManagerAddress"])
        raise DeploymentError("the Ray cluster has no head node that answers: see `ray status`")

    def free(self) -> Mapping[str, float]:
        return dict(ray.available_resources())  # type: ignore[no-untyped-call]

    def actor_names(self) -> list[str]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return sorted(actor["name"] for actor in named if actor["namespace"] == self._namespace)

    def actor(self, name: str) -> Any | None:
        try:
            return ray.get_actor(name, namespace=self._namespace)
        except ValueError:
            return None

    def reserve(self, instance: InstancePlan, on_node: Mapping[str, float]) -> PlacementGroup:
        """Asks for the instance's bundles; `wait` tells whether it has them.

        Args:
            on_node: added to the first bundle, to choose its node.
        """
        first, *rest = [dict(actor.bundle) for actor in instance.actors]
        bundles = [{**first, **on_node}, *rest]
        group: PlacementGroup = ray.util.placement_group(
            bundles, strategy=instance.strategy, name=instance.name, lifetime="detached"
        )
        return group

    def release(self, instance_name: str) -> None:
        """Gives the bundles back and kills what is in them. Twice does no harm."""
        try:
            group = ray.util.get_placement_group(instance_name)
        except ValueError:
            return
        ray.util.remove_placement_group(group)

    def start_engines(self, kind: type, setup: Any, actor: ActorPlan) -> Any:
        """An actor in its bundle, with all that is reserved there."""
        group = ray.util.get_placement_group(self._instance_name(actor))
        resources = dict(actor.bundle)
        return self._start(
            kind,
            setup,
            actor.name,
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, actor.node, False),
        )

    def start_on_head(self, kind: type, setup: Any, name: str) -> Any:
        """Needs no core: a head node often offers none."""
        return self._start(kind, setup, name, num_cpus=0, resources=dict(HEAD_NODE))

    def kill(self, name: str) -> None:
        """For good. Twice does no harm."""
        actor = self.actor(name)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def on_each_node(self, function: Any, *arguments: object, timeout_s: float) -> None:
        """Call it once on every living node; those that do not answer in time are left out."""
        task = ray.remote(function)
        calls = [
            task.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            ).remote(*arguments)
            for node in _nodes()
            if node["Alive"]
        ]
        ray.wait(calls, num_returns=len(calls), timeout=timeout_s)

    def _start(self, kind: type, setup: Any, name: str, **options: Any) -> Any:
        return (
            ray.remote(kind)
            .options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=_MAX_CONCURRENCY,
                **options,
            )
            .remote(setup)
        )

    @staticmethod
    def _instance_name(actor: ActorPlan) -> str:
        return ".".join(actor.name.split(".")[:2])


@contextmanager
def connected(address: str, deployment_name: str) -> Iterator[Cluster]:
    """A connection for one command.

    Raises:
        NoClusterError: there is none at this address, or it runs another version of Ray or Python.
        DeploymentError: what Ray has refused meanwhile.
    """
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    _check_reachable(address)
    if ray.is_initialized():
        raise DeploymentError("this process is connected to a Ray cluster already")
    try:
        ray.init(
            address=address,
            namespace=namespace(deployment_name),
            log_to_driver=False,
            logging_level=logging.ERROR,  # it warns of actors that end with their placement group: ours shall
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise NoClusterError(address, first_line) from None
    try:
        yield Cluster(deployment_name)
    except RayError as error:
        text = str(error).strip().split("\n")[-1]
        raise DeploymentError(f"the Ray cluster has refused or lost a call ({text}): see `ray status`") from error
    finally:
        ray.shutdown()


def ask(actors: Mapping[str, Any], method: str, timeout_s: float = _QUESTION_S) -> dict[str, Any]:
    """The answers of all actors that give one in time, by name."""
    calls = {getattr(actor, method).remote(): name for name, actor in actors.items()}
    if not calls:
        return {}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    answers = {}
    for call in done:
        try:
            answers[calls[call]] = ray.get(call)
        except RayError:  # it died, or is being started again: it has given no answer
            continue
    return answers


def wait(groups: Sequence[PlacementGroup], timeout_s: float) -> list[PlacementGroup]:
    """Those that have not got their bundles in time."""
    calls = {group.ready(): group for group in groups}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    return [group for call, group in calls.items() if call not in done]


def _check_reachable(address: str) -> None:
    """Ray itself would try for more than a minute.

    Raises:
        NoClusterError: nothing listens there.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():
        raise NoClusterError(address, "it is not HOST:PORT; Ray Client's ray:// is not used: run this on a node")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise NoClusterError(address, str(error)) from None


def _nodes() -> list[Any]:
    return ray.nodes()  # type: ignore[no-untyped-call, no-any-return]
