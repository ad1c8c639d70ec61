"""One group at an address that a cluster has given it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.errors import DeploymentError
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.relocate import Relocation

from .samples import content, machine


@pytest.fixture
def model_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from .samples import model

    monkeypatch.setattr("omni.deployment.load.read_model_info", lambda folder: model(path=folder))


def planned_at(folder: Path, relocation: Relocation, **group: Any) -> LaunchPlan:
    data = content(2)
    data["deployment"]["prefill"]["group2"] |= group
    file = folder / "deploy.yml"
    file.write_text(yaml.safe_dump(data))
    return load_plan(file, machine(cores=2), relocation=relocation)


@pytest.mark.usefixtures("model_folder")
def test_the_group_is_here_and_joins_the_proxies(tmp_path: Path) -> None:
    relocation = Relocation(role="prefill", group="group2", listen="198.51.100.7", join=("proxy:7001", "other:7001"))
    plan = planned_at(tmp_path, relocation)
    (engine,) = plan.instance("prefill", "group2")
    assert engine.url == "http://198.51.100.7:9010"
    assert engine.cpu_cores == (0, 1)  # all of them: the other groups are elsewhere
    assert plan.control_addresses == ("proxy:7001", "other:7001")
    assert [process.name for process in plan.on("198.51.100.7")] == ["prefill.group2.rank0"]


@pytest.mark.usefixtures("model_folder")
def test_other_ports_follow_a_given_one(tmp_path: Path) -> None:
    relocation = Relocation(role="prefill", group="group2", listen="127.0.0.1", base_api_port=30000)
    (engine,) = planned_at(tmp_path, relocation, base_kv_port=9999).instance("prefill", "group2")
    assert engine.port == 30000
    assert engine.env["VLLM_DP_MASTER_PORT"] == "31000"


@pytest.mark.usefixtures("model_folder")
def test_a_further_node_knows_its_master(tmp_path: Path) -> None:
    two = {"hosts": "10.0.0.1,10.0.0.2", "tensor_parallel_size": 2, "host 10.0.0.2": {"base_api_port": 8000}}
    relocation = Relocation(role="prefill", group="group2", listen="198.51.100.7", node=1, master="192.0.2.1")
    plan = planned_at(tmp_path, relocation, **two)
    first, second = plan.instance("prefill", "group2")
    assert (first.host, second.host) == ("192.0.2.1", "198.51.100.7")
    assert "--headless" in second.command
    assert second.link_address == "192.0.2.1:10011"
    first, second = planned_at(
        tmp_path, Relocation(role="prefill", group="group2", listen="198.51.100.7"), **two
    ).instance("prefill", "group2")
    assert first.host == "198.51.100.7"


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": "group9"}, r"--group: there is no prefill group 'group9'; the deployment file has \['group1'"),
        ({"node": 1, "master": "192.0.2.1"}, "--node: 1 of 1; write 0 to 0"),
        ({"node": -1}, "--node: -1 of 1"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"role": "prefill", "group": "group2", "listen": "198.51.100.7"}
    with pytest.raises(DeploymentError, match=words):
        planned_at(tmp_path, Relocation(**(asked | changes)))


@pytest.mark.usefixtures("model_folder")
def test_a_further_node_without_a_master(tmp_path: Path) -> None:
    relocation = Relocation(role="prefill", group="group2", listen="198.51.100.7", node=1)
    with pytest.raises(DeploymentError, match="--master: is missing; write the address of node 0"):
        planned_at(tmp_path, relocation, hosts="10.0.0.1,10.0.0.2", tensor_parallel_size=2)


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize("node", [0, 1])
def test_ranks_that_each_span_nodes(tmp_path: Path, node: int) -> None:
    """Node 2 is the second rank's master, and nobody knows where it is."""
    relocation = Relocation(role="prefill", group="group2", listen="198.51.100.7", node=node, master="192.0.2.1")
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    with pytest.raises(DeploymentError, match=r"prefill\.group2\.data_parallel_size: 2 ranks, .* write 1, and a group"):
        planned_at(tmp_path, relocation, hosts="10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4", **sizes)
