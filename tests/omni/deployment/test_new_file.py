"""New deployment files: hosts and devices given to groups, and that what is written can be planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import DeploymentError
from omni.deployment.groups import group_settings
from omni.deployment.model import Deployment
from omni.deployment.new_file import NewFile, share_hosts
from omni.deployment.plan import make_plan
from tests.omni.deployment.samples import loaded, machine, model, put

HOSTS = tuple(f"10.0.0.{i}" for i in range(1, 9))


def new_file(prefill: int = 1, decode: int = 1, mixed: int = 0, **changes: Any) -> NewFile:
    start = NewFile(
        name="trial",
        backend="local",
        platform="cpu",
        num_groups={"prefill": prefill, "decode": decode, "mixed": mixed},
        model_path="/models/smollm2",
        hosts=("127.0.0.1",),
    )
    return replace(start, **changes)


def written(new: NewFile, folder: Path) -> Deployment:
    path = folder / "written.yaml"
    path.write_text(new.text())
    return load_deployment(path)


def planned(new: NewFile, folder: Path) -> list[str]:
    plan = make_plan(written(new, folder), model(), machine(gib=500), config_file=folder / "written.yaml")
    return [process.name for process in plan.processes]


@pytest.mark.parametrize(
    ("hosts", "groups", "shares"),
    [
        (HOSTS, (4, 1, 0), [1, 1, 1, 1, 4]),  # the form of ../shared/design/field-deployment-4p1d.yml
        (HOSTS, (1, 1, 0), [4, 4]),
        (HOSTS, (2, 1, 0), [2, 2, 4]),
        (HOSTS, (1, 1, 1), [2, 4, 2]),  # the rest is D's
        (HOSTS, (0, 0, 3), [2, 2, 4]),
    ],
)
def test_shares(hosts: tuple[str, ...], groups: tuple[int, int, int], shares: list[int]) -> None:
    found = share_hosts(hosts, dict(zip(("prefill", "decode", "mixed"), groups, strict=True)))
    assert list(map(len, found)) == shares
    assert tuple(host for part in found for host in part) == hosts, "each once, in the order given"


def test_fewer_hosts_than_groups() -> None:
    found = share_hosts(HOSTS[:2], {"prefill": 2, "decode": 1, "mixed": 0})
    assert found == [("10.0.0.1",), ("10.0.0.2",), ("10.0.0.1",)]


def test_4p1d_on_npus(tmp_path: Path) -> None:
    new = new_file(4, 1, backend="ansible", platform="npu", hosts=HOSTS, devices=tuple(range(16)))
    deployment = written(new, tmp_path)
    groups = list(group_settings(deployment))
    assert [(g.role, g.tensor_parallel_size, g.data_parallel_size) for g in groups] == [
        *[("prefill", 16, 1)] * 4,
        ("decode", 1, 64),
    ]
    assert {g.group.base_api_port for g in groups} == {9000}, "each has its hosts alone"
    assert deployment.deployment.proxy.host == "10.0.0.1"
    assert len(planned(new, tmp_path)) == 4 + 64 + 1


@pytest.mark.parametrize(
    ("changes", "num_processes"),
    [
        ({}, 3),
        ({"backend": "ray", "hosts": ()}, 3),
        ({"backend": "ansible", "hosts": HOSTS[:1]}, 3),
        ({"backend": "ansible", "hosts": HOSTS[:5]}, 1 + 5),  # a CPU's ranks are one for each host
        ({"platform": "npu", "devices": (0, 1, 2, 3)}, 1 + 2 + 1),
        ({"platform": "cuda", "devices": (0, 1, 2, 3)}, 1 + 2 + 1),
        ({"platform": "cuda", "devices": (0, 1), "backend": "ansible", "hosts": HOSTS[:2]}, 1 + 2 + 1),
        ({"platform": "npu", "devices": tuple(range(8)), "backend": "kubernetes", "hosts": ()}, 1 + 8 + 1),
        ({"platform": "npu", "devices": tuple(range(8)), "backend": "ray", "hosts": HOSTS[:4]}, 2 + 16 + 1),
    ],
)
def test_every_kind_can_be_planned(changes: dict[str, Any], num_processes: int, tmp_path: Path) -> None:
    assert len(planned(new_file(**changes), tmp_path)) == num_processes


def test_many_groups_on_one_machine(tmp_path: Path) -> None:
    assert len(planned(new_file(6, 4, 2), tmp_path)) == 13


@pytest.mark.parametrize(
    "new",
    [
        new_file(60, 41),
        new_file(300, 300, 300),
        new_file(30, 20, platform="npu", devices=tuple(range(70))),
        new_file(1, 1, platform="npu", devices=tuple(range(1024))),
    ],
    ids=["101", "900", "50 with devices", "of 512 ranks"],
)
def test_no_two_of_many_groups_share_a_port(new: NewFile, tmp_path: Path) -> None:
    data = yaml.safe_load(new.text())
    put(data, "services/kv_transfer", {"mode": "layerwise"})
    put(data, "services/prefill", {"kv_events": True})  # with all ports that there are
    deployment = loaded(tmp_path, data)  # which refuses that
    assert sum(1 for _ in group_settings(deployment)) == sum(new.num_groups.values())


def test_groups_of_many_ranks_on_one_machine(tmp_path: Path) -> None:
    new = new_file(1, 2, platform="npu", devices=tuple(range(48)))
    assert len(planned(new, tmp_path)) == 1 + 16 + 16 + 1


def test_mixed_alone(tmp_path: Path) -> None:
    deployment = written(new_file(0, 0, 2), tmp_path)
    assert list(deployment.deployment.mixed) == ["group1", "group2"]
    assert not deployment.deployment.prefill


def test_one_machine_s_devices_are_divided(tmp_path: Path) -> None:
    new = new_file(2, 1, platform="npu", devices=(0, 1, 2, 3, 8, 9, 10))
    groups = group_settings(written(new, tmp_path))
    assert [group.devices("127.0.0.1") for group in groups] == [(0, 1), (2, 3), (8, 9, 10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "npu", "devices": (0,)}, "--devices: 1 for 2 groups on one host"),
        (
            {"platform": "npu", "devices": (0, 1), "backend": "ansible", "hosts": HOSTS[:1]},
            "--hosts: 1 for 2 groups, and with devices each has hosts of its own; name at least 2, or write fewer",
        ),
        ({"model_path": "a\nb"}, "holds characters that do not print"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        new_file(**changes).text()
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a: b", "#x", "true", "12", "'", '"', "- a", "é", "{x}", "a # b", "*a", "%", "0x1f"])
def test_texts_that_yaml_would_misread(text: str, tmp_path: Path) -> None:
    new = new_file(model_path=f"/{text}", docker_image=text, code_path=text, login={"user": text, "private_key": text})
    deployment = written(new, tmp_path)
    assert deployment.services.model_path == f"/{text}"
    assert deployment.services.docker_image == deployment.services.code_path == text
    for block in (deployment.deployment.proxy, deployment.deployment.prefill["group1"]):
        assert (block.user, block.private_key) == (text, text)


def test_where_a_password_may_stand(tmp_path: Path) -> None:
    assert "password" in new_file(backend="ansible").text()
    assert "password" not in new_file(backend="ansible", login={"private_key": "/k"}).text()
    assert "password" not in new_file().text()
