from collections.abc import Mapping

from omni.deployment.backends.ray.capacity import capacity_problems, instance_need
from omni.deployment.backends.ray.placement import ActorPlan, InstancePlan


def instance(
    group: str, *bundles: Mapping[str, float], device: str | None = None, executor_devices: int = 0
) -> InstancePlan:
    actors = tuple(
        ActorPlan(name=f"{group}.{node}", node=node, num_ranks=1, bundle=bundle, process_names=(f"{group}.rank0",))
        for node, bundle in enumerate(bundles)
    )
    return InstancePlan(
        role="decode",
        group=group,
        strategy="STRICT_SPREAD",
        actors=actors,
        device=device,
        executor_devices=executor_devices,
    )


def _problems(instances: list[InstancePlan], *nodes: Mapping[str, float]) -> list[str]:
    return [str(problem) for problem in capacity_problems(instances, nodes)]


def test_what_fits_is_no_problem() -> None:
    assert _problems([instance("group1", {"CPU": 2}), instance("group2", {"CPU": 2})], {"CPU": 4}) == []
    assert _problems([instance("group1", {"NPU": 8}, {"NPU": 8})], {"NPU": 8}, {"NPU": 8}) == []


def test_a_bundle_no_node_can_hold() -> None:
    nodes = ({"NPU": 4, "CPU": 64}, {"NPU": 4, "CPU": 64})
    (problem,) = _problems([instance("group1", {"NPU": 8, "CPU": 1})], *nodes)
    assert problem == (
        "deployment.decode.group1: needs 8 NPU and 1 CPU on one node; the most that any of 2 has is 4 NPU and 64 CPU; "
        "add nodes to the cluster, or ask for less"
    )


def test_what_a_node_must_have_at_once() -> None:
    """Enough of either is not enough of both."""
    (problem,) = _problems([instance("group1", {"NPU": 8, "CPU": 8})], {"NPU": 8, "CPU": 1}, {"CPU": 64})
    assert "needs 8 NPU and 8 CPU on one node" in problem


def test_as_many_nodes_as_it_has_bundles() -> None:
    (problem,) = _problems([instance("group1", {"CPU": 1}, {"CPU": 1})], {"CPU": 8})
    assert problem.startswith("deployment.decode.group1: needs 2 nodes, the cluster has 1; ")


def test_the_first_group_that_finds_nothing_left_is_named() -> None:
    groups = [instance(f"group{number}", {"CPU": 2}) for number in (1, 2, 3, 4)]
    (problem,) = _problems(groups, {"CPU": 3}, {"CPU": 2})
    assert problem.startswith("deployment.decode.group3: needs 2 CPU; of the cluster's 5 the groups above leave 1; ")


def test_what_vllm_reserves_itself_counts() -> None:
    group = instance("group1", {"CPU": 1}, device="GPU", executor_devices=16)
    assert instance_need(group) == {"CPU": 1, "GPU": 16}
    (problem,) = _problems([group], {"CPU": 8, "GPU": 8})
    assert "needs 16 GPU; of the cluster's 8" in problem
    assert _problems([group], {"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}) == []


def test_a_cluster_without_nodes() -> None:
    problems = _problems([instance("group1", {"CPU": 1})])
    assert any("the cluster has none" in problem for problem in problems)
