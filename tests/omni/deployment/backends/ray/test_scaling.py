from pathlib import Path

import pytest

from omni.deployment.backends.ray.placement import instance_plans
from omni.deployment.backends.ray.scaling import changes, with_groups
from omni.deployment.errors import ConfigError
from tests.omni.deployment.samples import content, loaded, put

PRESENT = ["prefill.group1", "decode.group1", "decode.group3"]


def test_new_names_are_the_first_free_ones() -> None:
    assert changes(PRESENT, {"prefill": 2, "decode": 4}) == (["prefill.group2", "decode.group2", "decode.group4"], [])


def test_the_last_go_first() -> None:
    assert changes([*PRESENT, "decode.group2"], {"decode": 1}) == ([], ["decode.group2", "decode.group3"])
    assert changes(PRESENT, {"prefill": 1, "decode": 2}) == ([], [])


def test_a_role_keeps_one_and_gets_none_that_it_never_had() -> None:
    with pytest.raises(ConfigError, match="decode=0: a deployment has one of each"):
        changes(PRESENT, {"decode": 0})
    with pytest.raises(ConfigError, match="mixed=1: the deployment has no mixed groups"):
        changes(PRESENT, {"mixed": 1})


def test_a_new_group_is_like_the_first_and_one_of_the_file_as_it_is_there(tmp_path: Path) -> None:
    data = put(content(decode=2), "deployment/decode/group1/tensor_parallel_size", 4)
    deployment = with_groups(loaded(tmp_path, data), ["decode.group2", "decode.group3"])
    bundles = {plan.name: plan.actors[0].bundle for plan in instance_plans(deployment)}
    assert bundles["decode.group2"] == {"CPU": 1}
    assert bundles["decode.group3"] == {"CPU": 4}


def test_a_new_group_takes_nobodys_devices_or_ports(tmp_path: Path) -> None:
    """Both are told apart by host in a deployment file; on a cluster they are the node's."""
    data = put(content(), "deployment/decode/group1/ascend_rt_visible_devices", "0,1")
    data = put(data, "deployment/prefill/group1/ascend_rt_visible_devices", "2,3")
    deployment = with_groups(loaded(tmp_path, data), ["decode.group2"])
    assert instance_plans(deployment)[-1].actors[0].bundle == {"NPU": 2, "CPU": 2}
    first, second = deployment.deployment.decode.values()
    assert not {*first.hosts} & {*second.hosts}
