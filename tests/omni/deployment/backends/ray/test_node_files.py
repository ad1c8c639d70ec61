"""What an actor writes on its node: a deployment file that the engines' own program accepts, and nothing of others'."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from kv_transfer.auth import KEY_BYTES, load_key
from omni.deployment.backends.ray.node_files import (
    NodeFolder,
    clean_node,
    deployment_folder,
    group_config,
    group_ports,
    with_devices,
)
from omni.deployment.deployment_file import load_deployment
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.model import Deployment
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.relocate import Relocation
from omni.deployment.run_state import ProcessState, RunFolder
from tests.omni.deployment.samples import content, loaded, machine, model, put

KEY = "ab" * KEY_BYTES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFolder:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return NodeFolder.of("omni.trial", "prefill.group1")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_for_this_user_alone(folder: NodeFolder) -> None:
    assert folder.make(KEY) == 0
    key_file = folder.state / "deployment.key"
    assert (_mode(key_file), _mode(folder.path), _mode(folder.path.parent)) == (0o600, 0o700, 0o700)
    load_key(key_file)
    assert str(os.geteuid()) in str(folder.path)


def test_an_actor_that_comes_back_finds_its_logs_and_no_old_state(folder: NodeFolder) -> None:
    folder.make(KEY)
    RunFolder(folder.state / "trial").write(ProcessState(name="prefill.group1.rank0", state="ready"))
    (folder.logs / "prefill.group1.log").write_text("earlier")
    assert list(folder.process_states()) == ["prefill.group1.rank0"]
    assert folder.make(KEY) == 1
    assert folder.process_states() == {}
    assert folder.read_logs() == {"prefill.group1.log": b"earlier"}


def test_a_killed_program_is_not_ready_for_ever(folder: NodeFolder) -> None:
    folder.make(KEY)
    RunFolder(folder.state / "trial").write(ProcessState(name="prefill.group1.rank0", state="ready"))
    folder.forget_processes()
    assert folder.process_states() == {}
    load_key(folder.state / "deployment.key")


def test_the_last_actor_takes_all_of_it_away(folder: NodeFolder, tmp_path: Path) -> None:
    other = NodeFolder.of("omni.trial", "decode.group1")
    folder.make(KEY)
    other.make(KEY)
    folder.remove()
    assert other.state.is_dir()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_lost_actor_left_goes_with_the_deployment(folder: NodeFolder, tmp_path: Path) -> None:
    folder.make(KEY)
    NodeFolder.of("omni.other", "proxy").make(KEY)
    clean_node("omni.trial")
    assert not deployment_folder("omni.trial").exists()
    assert deployment_folder("omni.other").exists()
    clean_node("omni.other")
    assert list(tmp_path.iterdir()) == []


def _config(folder: Path, data: dict[str, Any], *, uses_executor: bool = False) -> tuple[dict[str, Any], Deployment]:
    deployment = loaded(folder, data)
    return group_config(deployment, _first(deployment), uses_executor=uses_executor), deployment


def _first(deployment: Deployment) -> GroupSettings:
    return next(iter(group_settings(deployment)))


def _planned_on_node(folder: Path, config: dict[str, Any], **more: Any) -> LaunchPlan:
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump(config))
    relocation = Relocation(
        role="prefill", group="group1", listen="198.51.100.7", join=("10.9.9.9:7001",), base_api_port=19000, **more
    )
    deployment = relocation.of(load_deployment(file))
    return make_plan(deployment, model(), machine(), config_file=file, on="198.51.100.7")


def test_the_nodes_file_plans_as_the_whole_one(tmp_path: Path) -> None:
    data = put(content(prefill=2, decode=2), "services/prefill/max_model_len", 1000)
    config, _ = _config(tmp_path, data)
    (engine,) = _planned_on_node(tmp_path, config).instance("prefill", "group1")
    arguments = dict(zip(engine.command[3::2], engine.command[4::2], strict=False))
    assert arguments["--host"] == "198.51.100.7"
    assert arguments["--port"] == "19000"
    assert arguments["--max-model-len"] == "1000"


def test_groups_of_several_hosts_too(tmp_path: Path) -> None:
    data = put(content(), "deployment/prefill/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/prefill/group1/host 10.0.0.2", {"base_api_port": 9300})
    data = put(data, "deployment/prefill/group1/data_parallel_size", 2)
    config, _ = _config(tmp_path, data)
    plan = _planned_on_node(tmp_path, config, node=1, master="10.7.7.7")
    here = [engine for engine in plan.instance("prefill", "group1") if engine.host == "198.51.100.7"]
    assert [engine.name for engine in here] == ["prefill.group1.rank1"]
    assert [engine.port for engine in here] == [19000]


def test_nothing_secret_travels_with_it(tmp_path: Path) -> None:
    data = put(content(), "deployment/prefill/group1/password", "sesame")
    data = put(data, "deployment/decode/group1/private_key", "/home/me/id")
    data = put(data, "deployment/decode/group1/host 127.0.0.1", {"user": "me", "base_api_port": 9700})
    data = put(data, "deployment/proxy/api_keys_file", str(tmp_path / "keys"))
    data = put(data, "services/kv_transfer", {"key_file": str(tmp_path / "key"), "lease_s": 20})
    config, _ = _config(tmp_path, data)
    text = yaml.safe_dump(config)
    for secret in ("sesame", "password", "/home/me", "user", "keys", "key_file"):
        assert secret not in text
    assert config["services"]["kv_transfer"] == {"lease_s": 20}
    assert config["deployment"]["decode"]["group1"]["host 127.0.0.1"] == {"base_api_port": 9700}


def test_npus_are_those_that_ray_has_given(tmp_path: Path) -> None:
    data = put(content(), "deployment/prefill/group1/ascend_rt_visible_devices", "0,1")
    data = put(data, "deployment/decode/group1/ascend_rt_visible_devices", "2,3")
    config, _ = _config(tmp_path, data)
    plan = _planned_on_node(
        tmp_path, with_devices(config, "prefill", "group1", (2, 7))
    )  # 2: as the file has for another
    (engine,) = plan.instance("prefill", "group1")
    assert engine.env["ASCEND_RT_VISIBLE_DEVICES"] == "2,7"
    assert engine.command[engine.command.index("--tensor-parallel-size") + 1] == "2"


def test_gpus_are_those_that_ray_has_given(tmp_path: Path) -> None:
    config, _ = _config(tmp_path, put(content(), "platform", "cuda"))
    plan = _planned_on_node(tmp_path, with_devices(config, "prefill", "group1", (3,)))
    (engine,) = plan.instance("prefill", "group1")
    assert engine.env["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize("platform", ["npu", "cuda"])
def test_vllms_ray_executor_is_asked_for_all_of_a_rank(tmp_path: Path, platform: str) -> None:
    """16 workers on two nodes: one api server, no devices of its own, vLLM's flag."""
    data = put(content(), "platform", platform)
    data = put(data, "deployment/prefill/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/prefill/group1/tensor_parallel_size", 16)
    data = put(data, "deployment/prefill/group1/extra_args", ["--max-num-seqs", "8"])
    if platform == "npu":
        data = put(data, "deployment/prefill/group1/ascend_rt_visible_devices", "0,1,2,3,4,5,6,7")
    config, _ = _config(tmp_path, data, uses_executor=True)
    (engine,) = _planned_on_node(tmp_path, config).instance("prefill", "group1")
    command = list(engine.command)
    assert command[-4:] == ["--distributed-executor-backend", "ray", "--max-num-seqs", "8"]
    assert command[command.index("--tensor-parallel-size") + 1] == "16"
    assert "--nnodes" not in command
    assert "ASCEND_RT_VISIBLE_DEVICES" not in engine.env


def test_all_ports_of_a_group() -> None:
    assert group_ports(9000, 2) == (9000, 9001, 11000, 11001, 12000, 12001, 12002, 12003, 10000)
    assert 9000 in group_ports(9000, 0), "a further node keeps one for its workers"
