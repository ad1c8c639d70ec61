"""What `render` writes: an inventory without secrets, passwords by themselves, the hosts' deployment file."""

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.backends.ansible.backend import Backend
from omni.deployment.backends.ansible.inventory import inventory_text
from omni.deployment.backends.ansible.leaving import hosts_that_left
from omni.deployment.backends.ansible.machines import inventory_hosts, machines_of
from omni.deployment.backends.ansible.rendering import backend_problems, render
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError
from omni.deployment.load import load_plan
from tests.omni.deployment.backends.ansible.samples import content, plan_of
from tests.omni.deployment.samples import FIELD_FILE


def inventory(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((folder / "inventory.yml").read_text())["all"]
    return read


def host(folder: Path, name: str) -> dict[str, Any]:
    groups = inventory(folder)["children"]
    return next(groups[letter]["hosts"][name] for letter in "PDMC" if name in groups[letter]["hosts"])


class TestInventory:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        render(plan_of(tmp_path, content()), tmp_path / "out")
        return tmp_path / "out"

    def test_a_host_for_each_part_of_an_instance(self, folder: Path) -> None:
        groups = inventory(folder)["children"]
        assert {letter: [*groups[letter]["hosts"]] for letter in "PDMC"} == {
            "P": ["p1"],
            "D": ["d1", "d1_node1"],
            "M": [],
            "C": ["c0"],
        }
        assert [*groups["machines"]["hosts"]] == ["p1", "d1", "d1_node1", "c0"]
        assert [*groups["engines"]["hosts"]] == ["p1", "d1", "d1_node1"]

    def test_what_is_known_of_a_master(self, folder: Path) -> None:
        master = host(folder, "d1")
        assert master["instance"] == "decode.group1"
        assert master["instance_hosts"] == ["d1", "d1_node1"]
        assert master["devices"] == [0, 1, 2, 3]
        assert master["ansible_user"] == "admin"
        assert "ansible_ssh_private_key_file" not in master

    def test_a_host_of_its_own_key(self, folder: Path) -> None:
        node = host(folder, "d1_node1")
        assert node["ansible_ssh_private_key_file"] == "/keys/other"
        assert node["ansible_user"] == "admin"
        assert node["devices"] == [4, 5, 6, 7]
        assert node["node_rank"] == 1
        assert "instance_hosts" not in node

    def test_a_password_is_in_a_file_of_this_user_alone(self, folder: Path) -> None:
        holding = [path for path in folder.rglob("*") if path.is_file() and "pa{{ss}}word" in path.read_text()]
        assert holding == [folder / "host_vars/d1/passwords.yml"]
        assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
        # Ansible must not take it for a template.
        assert holding[0].read_text() == 'ansible_password: !unsafe "pa{{ss}}word"\n'

    def test_a_password_of_its_own_takes_the_place_of_the_group_s_key(self, tmp_path: Path) -> None:
        data = content()
        data["deployment"]["decode"]["group1"] |= {"private_key": "/keys/id", "host 10.0.0.3": {"password": "x"}}
        del data["deployment"]["decode"]["group1"]["password"]
        render(plan_of(tmp_path, data), tmp_path / "own")
        assert host(tmp_path / "own", "d1")["ansible_ssh_private_key_file"] == "/keys/id"
        assert "ansible_ssh_private_key_file" not in host(tmp_path / "own", "d1_node1")

    def test_nobody_else_reads_the_hosts_file(self, folder: Path) -> None:
        assert stat.S_IMODE((folder / "deployment.yml").stat().st_mode) == 0o600  # env may hold a token

    def test_a_password_that_is_no_more_is_removed(self, folder: Path, tmp_path: Path) -> None:
        data = content()
        del data["deployment"]["decode"]["group1"]["password"]
        render(plan_of(tmp_path, data), folder)
        assert not list(folder.glob("host_vars/*/*"))

    def test_one_ansible_process_for_each_host(self, folder: Path) -> None:
        assert "forks = 4" in (folder / "ansible.cfg").read_text()

    def test_again_it_is_the_same(self, folder: Path, tmp_path: Path) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        render(plan_of(tmp_path, content()), folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


class TestCopiedFile:
    def test_plans_the_same_processes_and_holds_no_way_to_log_in(self, tmp_path: Path) -> None:
        data = content(kv_transfer={"key_file": "/here/key", "num_connections": 2})
        data["deployment"]["decode"]["group1"]["env"] = {"user": "kept"}
        plan = plan_of(tmp_path, data)
        render(plan, tmp_path / "out")
        copied = tmp_path / "out/deployment.yml"
        written = load_deployment(copied)
        assert written.name == "sample"
        assert written.backend == "ansible"
        assert written.services.kv_transfer.key_file is None
        assert written.services.kv_transfer.num_connections == 2
        assert "keys" not in copied.read_text()
        assert "admin" not in copied.read_text()
        assert [process.env for process in load_plan(copied).processes] == [p.env for p in plan.processes]
        assert [p.command for p in load_plan(copied).engines] != []

    def test_logs_go_where_the_controller_looks_for_them(self, tmp_path: Path) -> None:
        data = content()
        del data["services"]["log_path"]
        plan = plan_of(tmp_path, data)
        render(plan, tmp_path / "out")
        assert load_deployment(tmp_path / "out/deployment.yml").log_folder == plan.deployment.log_folder


class TestFieldFile:
    def test_eight_machines_for_nine_hosts(self) -> None:
        hosts = inventory_hosts(load_plan(FIELD_FILE).deployment)
        machines = machines_of(hosts)
        assert [h.name for h in hosts] == ["p1", "p2", "p3", "p4", "d1", "d1_node1", "d1_node2", "d1_node3", "c0"]
        assert [machine.first.name for machine in machines] == [h.name for h in hosts[:-1]]
        assert [h.name for h in machines[0].hosts] == ["p1", "c0"]
        assert machines[0].devices == tuple(range(16))


class TestProblems:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"services": {"runtime": "docker", "docker_image": None}}, "services.docker_image"),
            ({"services": {"runtime": "host"}}, "services.venv_path"),
            ({"services": {"local_code_path": "/code"}}, "services.code_path"),
            ({"services": {"code_path": "code"}}, "services.code_path"),
            ({"proxy": {"host": "0.0.0.0"}}, "deployment.proxy.host"),
            ({"proxy": {"host": "127.0.0.1"}}, "deployment"),
        ],
    )
    def test_refused_before_anything_is_written(self, change: dict[str, Any], field: str, tmp_path: Path) -> None:
        data = content()
        data["services"] = {k: v for k, v in {**data["services"], **change.get("services", {})}.items() if v}
        data["deployment"]["proxy"] |= change.get("proxy", {})
        plan = plan_of(tmp_path, data)
        with pytest.raises(ConfigError, match=field):
            Backend().render(plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_none_in_a_good_file(self, tmp_path: Path) -> None:
        assert not list(backend_problems(plan_of(tmp_path, content()).deployment))


class TestLeaving:
    def left(self, tmp_path: Path, data: dict[str, Any]) -> list[str]:
        before = inventory_text(plan_of(tmp_path, content()).deployment)
        return hosts_that_left(before, inventory_text(plan_of(tmp_path, data).deployment))

    def test_nobody_while_the_file_is_the_same(self, tmp_path: Path) -> None:
        assert self.left(tmp_path, content()) == []

    def test_a_host_whose_group_has_another_now(self, tmp_path: Path) -> None:
        data = content()
        data["deployment"]["prefill"]["group1"]["hosts"] = "10.0.0.9"
        assert self.left(tmp_path, data) == ["p1"]

    def test_the_proxy_that_moved(self, tmp_path: Path) -> None:
        data = content()
        data["deployment"]["proxy"]["host"] = "10.0.0.1"
        assert self.left(tmp_path, data) == ["c0"]

    def test_the_proxy_that_left_a_host_with_engines(self, tmp_path: Path) -> None:
        data = content()
        after = inventory_text(plan_of(tmp_path, data).deployment)
        data["deployment"]["proxy"]["host"] = "10.0.0.1"
        assert hosts_that_left(inventory_text(plan_of(tmp_path, data).deployment), after) == ["c0"]


def test_files_of_the_proxy_are_its_machine_s(tmp_path: Path) -> None:
    data = content()
    data["deployment"]["proxy"] |= {"host": "10.0.0.1", "api_keys_file": "/etc/keys"}
    render(plan_of(tmp_path, data), tmp_path / "out")
    assert host(tmp_path / "out", "p1")["machine_files"] == ["/etc/keys"]
    assert "machine_files" not in host(tmp_path / "out", "c0")
