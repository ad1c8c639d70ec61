"""Whether a cluster could hold a deployment at all, were nothing else on it. Pure.

Ray would let a placement group that fits nowhere wait for ever. What fits, but not now, is found by reserving it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from omni.deployment.backends.ray.placement import InstancePlan
from omni.deployment.errors import Problem

Resources = Mapping[str, float]
_MEND = "add nodes to the cluster, or ask for less"


def capacity_problems(instances: Sequence[InstancePlan], nodes: Sequence[Resources]) -> Iterator[Problem]:
    """Args:
    nodes: what each node has, free or not.
    """
    lacking = [problem for instance in instances for problem in _instance_problems(instance, nodes)]
    yield from lacking
    if not lacking:
        yield from _total_problems(instances, nodes)


def _instance_problems(instance: InstancePlan, nodes: Sequence[Resources]) -> Iterator[Problem]:
    wanting = set()
    for actor in instance.actors:
        if not any(_fits(actor.bundle, node) for node in nodes):
            wanting.add(f"needs {shown(actor.bundle)} on one node; {_most(actor.bundle, nodes)}")
    if len(instance.actors) > len(nodes):
        wanting.add(f"needs {len(instance.actors)} nodes, the cluster has {len(nodes)}")
    for text in sorted(wanting):
        yield Problem(instance.field, text, _MEND)


def _total_problems(instances: Sequence[InstancePlan], nodes: Sequence[Resources]) -> Iterator[Problem]:
    """In the order of the file: the first group for which nothing is left is the one that is named."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    used: Counter[str] = Counter()
    for instance in instances:
        need = instance_need(instance)
        for name, number in need.items():
            if used[name] + number > total[name]:
                left = total[name] - used[name]
                text = f"needs {number:g} {name}; of the cluster's {total[name]:g} the groups above leave {left:g}"
                yield Problem(instance.field, text, _MEND)
                return
        used.update(need)


def instance_need(instance: InstancePlan) -> dict[str, float]:
    """What it takes from the cluster, on all its nodes, vLLM's own reservation included."""
    need: Counter[str] = Counter()
    for actor in instance.actors:
        need.update(actor.bundle)
    if instance.device is not None and instance.executor_devices:
        need[instance.device] += instance.executor_devices
    return dict(need)


def shown(resources: Resources) -> str:
    """{"NPU": 8.0, "CPU": 1.0} → "8 NPU and 1 CPU"."""
    return " and ".join(f"{number:g} {name}" for name, number in resources.items())


def _fits(bundle: Resources, node: Resources) -> bool:
    return all(node.get(name, 0) >= number for name, number in bundle.items())


def _most(bundle: Resources, nodes: Sequence[Resources]) -> str:
    if not nodes:
        return "the cluster has none"
    most = (f"{max(node.get(name, 0) for node in nodes):g} {name}" for name in bundle)
    return f"the most that any of {len(nodes)} has is {' and '.join(most)}"
