"""What Ray is asked for: resources of each kind, over one node and several. Nothing here needs an accelerator."""

from pathlib import Path
from typing import Any

import pytest

from omni.deployment.backends.ray.placement import InstancePlan, instance_plans, ray_problems
from tests.omni.deployment.samples import content, loaded, planned, put


def _instances(folder: Path, data: dict[str, Any]) -> dict[str, InstancePlan]:
    return {instance.name: instance for instance in instance_plans(loaded(folder, data))}


def test_on_a_cpu_a_core_for_each_worker(tmp_path: Path) -> None:
    data = put(content(), "deployment/decode/group1/data_parallel_size", 2)
    data = put(data, "deployment/decode/group1/tensor_parallel_size", 2)
    instances = _instances(tmp_path, data)
    assert list(instances) == ["prefill.group1", "decode.group1"]
    (p,), (d,) = instances["prefill.group1"].actors, instances["decode.group1"].actors
    assert (p.bundle, p.num_ranks, p.process_names) == ({"CPU": 1}, 1, ("prefill.group1.rank0",))
    assert (d.bundle, d.num_ranks) == ({"CPU": 4}, 2)
    assert d.process_names == ("decode.group1.rank0", "decode.group1.rank1")
    assert instances["decode.group1"].strategy == "STRICT_PACK"


def test_on_npus_as_many_as_are_listed_and_which_is_rays_affair(tmp_path: Path) -> None:
    data = put(content(), "deployment/prefill/group1/ascend_rt_visible_devices", "0,1,2,3,4,5,6,7")
    data = put(data, "deployment/decode/group1/ascend_rt_visible_devices", "8,9")
    instances = _instances(tmp_path, data)
    assert instances["prefill.group1"].actors[0].bundle == {"NPU": 8, "CPU": 1}  # one rank, TP 8
    assert instances["decode.group1"].actors[0].bundle == {"NPU": 2, "CPU": 2}  # two ranks
    assert instances["prefill.group1"].device == "NPU"


def test_ranks_over_several_nodes_have_an_actor_on_each(tmp_path: Path) -> None:
    data = put(content(), "deployment/decode/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/decode/group1/ascend_rt_visible_devices", "0,1")
    decode = _instances(tmp_path, data)["decode.group1"]
    assert decode.strategy == "STRICT_SPREAD"
    assert [actor.name for actor in decode.actors] == ["decode.group1", "decode.group1.node1"]
    assert [actor.bundle for actor in decode.actors] == [{"NPU": 2, "CPU": 2}] * 2
    assert decode.actors[1].process_names == ("decode.group1.rank2", "decode.group1.rank3")
    assert decode.executor_devices == 0


@pytest.mark.parametrize(("platform", "device"), [("npu", "NPU"), ("cuda", "GPU")])
def test_a_rank_over_several_nodes_is_vllms_ray_executors(tmp_path: Path, platform: str, device: str) -> None:
    data = put(content(), "platform", platform)
    data = put(data, "deployment/prefill/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/prefill/group1/tensor_parallel_size", 16)
    if platform == "npu":
        data = put(data, "deployment/prefill/group1/ascend_rt_visible_devices", "0,1,2,3,4,5,6,7")
    prefill = _instances(tmp_path, data)["prefill.group1"]
    (driver,) = prefill.actors
    assert (prefill.device, prefill.executor_devices) == (device, 16)
    assert driver.bundle == {"CPU": 1}
    assert driver.process_names == ("prefill.group1.rank0",)


def test_on_cpus_such_a_rank_has_an_actor_on_each_node(tmp_path: Path) -> None:
    """vLLM's ray executor has no CPU platform."""
    data = put(content(), "deployment/prefill/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/prefill/group1/tensor_parallel_size", 4)
    prefill = _instances(tmp_path, data)["prefill.group1"]
    assert [actor.bundle for actor in prefill.actors] == [{"CPU": 2}] * 2
    assert [actor.num_ranks for actor in prefill.actors] == [1, 0]
    assert prefill.actors[1].process_names == ("prefill.group1.rank0.node1",)
    assert prefill.executor_devices == 0


def _problems(folder: Path, data: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in ray_problems(planned(folder, put(data, "backend", "ray")))]


def test_engines_must_be_able_to_join(tmp_path: Path) -> None:
    assert _problems(tmp_path, content()) == []
    (problem,) = _problems(tmp_path, put(content(), "deployment/proxy/control_port", 0))
    assert problem.startswith("deployment.proxy.control_port: 0, ")
    assert problem.endswith("delete the line or write a port")


def test_ranks_on_one_node_cannot_share_its_gpus(tmp_path: Path) -> None:
    data = put(content(), "platform", "cuda")
    assert _problems(tmp_path, data) == []
    (problem,) = _problems(tmp_path, put(data, "deployment/decode/group1/data_parallel_size", 2))
    assert problem.startswith("deployment.decode.group1.data_parallel_size: several DP ranks")


def test_nodes_that_change_places_must_be_alike(tmp_path: Path) -> None:
    data = put(content(), "deployment/decode/group1/hosts", "10.0.0.1,10.0.0.2")
    (problem,) = _problems(tmp_path, put(data, "deployment/decode/group1/data_parallel_size", 3))
    assert problem.startswith("deployment.decode.group1.hosts: its hosts have different numbers")
