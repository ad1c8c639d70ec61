"""The playbook's steps before servers start, run by Ansible on this machine as the only host, with a docker of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.backends.ansible.playbook_run import Outcome, run_playbook
from omni.deployment.backends.ansible.rendering import render
from tests.omni.deployment.backends.ansible.fake_docker import FakeDocker
from tests.omni.deployment.backends.ansible.samples import plan_of

_HCCN_TOOL = """#!/bin/sh
echo "ipaddr:29.4.1.$2"
echo "netmask:255.255.0.0"
"""
_NPU_SMI = """#!/bin/sh
case "$*" in
    *spod-info*) exit 1 ;;
    *"info -m"*) printf 'NPU ID Chip ID Chip Logic ID Chip Name\\n0 0 0 Ascend 910B\\n1 0 1 Ascend 910B\\n' ;;
esac
"""


class OneMachine:
    """1P1D and the proxy, all on this machine, reached without ssh."""

    def __init__(self, folder: Path, **services: Any) -> None:
        self.folder = folder
        self.docker = FakeDocker(folder / "docker")
        self.omni_path = folder / "omni"
        group = {"hosts": "198.51.100.1", "user": "x"}
        data = {
            "name": "one",
            "backend": "ansible",
            "deployment": {
                "prefill": {"group1": {**group, "base_api_port": 9000, "ascend_rt_visible_devices": "0"}},
                "decode": {"group1": {**group, "base_api_port": 9100, "ascend_rt_visible_devices": "1"}},
                "proxy": {"host": "198.51.100.1"},
            },
            "services": {"model_path": str(folder), "log_path": str(folder / "logs"), **services},
        }
        (folder / "model").mkdir()
        self.rendered = folder / "rendered"
        data["services"]["model_path"] = str(folder / "nowhere/model")
        render(plan_of(folder, data), self.rendered)

    def run(self, *tags: str, **variables: Any) -> Outcome:
        fixed = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "omni_path": str(self.omni_path),
            "docker": str(self.docker.program),
        }
        outcome = run_playbook(self.rendered, tags=tags, variables=fixed | variables, timeout_s=300)
        assert outcome.is_good, str(outcome)
        return outcome


def machine_in_docker(folder: Path) -> OneMachine:
    return OneMachine(folder, docker_image="image:1", http_proxy="http://192.0.2.9:3128")


@pytest.fixture(scope="class")
def started(tmp_path_factory: pytest.TempPathFactory) -> OneMachine:
    machine = machine_in_docker(tmp_path_factory.mktemp("docker"))
    assert any(machine.run("run_docker").num_changed.values())
    return machine


class TestDocker:
    """One container's life, from test to test."""

    def test_the_command(self, started: OneMachine) -> None:
        [command] = started.docker.calls("run")
        assert command[-2:] == ["image:1", "infinity"]
        assert {"--detach", "--init", "--network", "--ipc", "host"} <= {*command}
        devices = [word.removeprefix("--device=") for word in command if word.startswith("--device=")]
        assert devices == ["/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
        mounts = [word.removeprefix("--mount=type=bind,") for word in command if word.startswith("--mount")]
        folder = started.folder
        for path in (started.omni_path, folder / "logs"):
            assert f"source={path},target={path}" in mounts
        driver = ("/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi", "/etc/hccn.conf")
        for read_only in (folder / "nowhere/model", *driver):
            assert f"source={read_only},target={read_only},readonly" in mounts
        # Named, not given: what a proxy's URL may hold is in no list of processes.
        assert {"--env=http_proxy", "--env=https_proxy"} <= {*command}

    def test_a_missing_image_is_pulled_through_the_proxy(self, started: OneMachine) -> None:
        assert started.docker.calls("pull") == [["pull", "image:1"]]
        assert started.docker.proxy_of_pull == "http://192.0.2.9:3128"

    def test_again_it_changes_nothing(self, started: OneMachine) -> None:
        started.docker.forget()
        assert not any(started.run("run_docker").num_changed.values())
        assert not [call for word in ("run", "rm", "pull", "start") for call in started.docker.calls(word)]

    def test_a_container_that_has_ended_is_started(self, started: OneMachine) -> None:
        started.docker.end_container()
        started.docker.forget()
        started.run("run_docker")
        assert len(started.docker.calls("start")) == 1
        assert not started.docker.calls("run")

    def test_one_with_other_options_is_replaced(self, started: OneMachine) -> None:
        started.docker.forget()
        started.run("run_docker", model_path="/elsewhere")
        assert len(started.docker.calls("rm")) == 1
        assert len(started.docker.calls("run")) == 1

    def test_clean_up_removes_it_and_may_be_run_again(self, started: OneMachine) -> None:
        assert any(started.run("clean_up").num_changed.values())
        assert not started.omni_path.exists()
        assert (started.folder / "model").exists()
        assert not any(started.run("clean_up").num_changed.values())


class TestRankTables:
    def test_made_merged_and_handed_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name, text in (("hccn_tool", _HCCN_TOOL), ("npu-smi", _NPU_SMI)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        machine = machine_in_docker(tmp_path)
        machine.run("run_docker", "ranktable")
        folder = tmp_path / "logs/ranktable"
        assert {path.name for path in folder.iterdir()} == {"prefill.group1.json", "decode.group1.json", "global.json"}
        merged = json.loads((folder / "global.json").read_text())
        devices = [
            device["device_id"]
            for group in merged["server_group_list"]
            for server in group["server_list"]
            for device in server["device"]
        ]
        assert devices == ["0", "1"]
        assert not any(machine.run("ranktable").num_changed.values())

    def test_none_without_npus(self, tmp_path: Path) -> None:
        machine = OneMachine(tmp_path, venv_path="/nowhere", runtime="host")
        inventory = machine.rendered / "inventory.yml"
        inventory.write_text(inventory.read_text().replace("platform: npu", "platform: cpu"))
        assert not any(machine.run("ranktable").num_changed.get(host, 0) > 1 for host in ("p1", "d1"))
        assert not (tmp_path / "logs/ranktable").exists()


def code_in(folder: Path) -> Path:
    source = folder / "source"
    (source / "package/__pycache__").mkdir(parents=True)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "sample_of_omni"\nversion = "1"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["package"]\n'
    )
    (source / "package/__init__.py").write_text("x = 1\n")
    (source / "package/old.py").write_text("")
    (source / "package/__pycache__/x.pyc").write_text("")
    return source


def machine_with_code(folder: Path) -> OneMachine:
    return OneMachine(folder, runtime="host", local_code_path=str(code_in(folder)), code_path=str(folder / "code"))


@pytest.fixture(scope="class")
def copied(tmp_path_factory: pytest.TempPathFactory) -> OneMachine:
    machine = machine_with_code(tmp_path_factory.mktemp("code"))
    machine.run("sync_code")
    return machine


class TestCode:
    """One copy's life, from test to test."""

    def test_copied_without_what_is_made_of_it(self, copied: OneMachine) -> None:
        code = copied.folder / "code"
        found = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
        assert found == {"pyproject.toml", "package/__init__.py", "package/old.py"}

    def test_again_it_changes_nothing(self, copied: OneMachine) -> None:
        assert not any(copied.run("sync_code").num_changed.values())

    def test_what_has_changed_is_changed_and_what_is_gone_goes(self, copied: OneMachine) -> None:
        source, code = copied.folder / "source", copied.folder / "code"
        (code / "package/mine.py").write_text("")
        (source / "package/old.py").unlink()
        (source / "package/__init__.py").write_text("x = 22\n")
        copied.run("sync_code")
        assert (code / "package/__init__.py").read_text() == "x = 22\n"
        assert sorted(path.name for path in (code / "package").iterdir()) == ["__init__.py", "mine.py"]

    def test_clean_up_leaves_what_was_not_put_there(self, copied: OneMachine) -> None:
        copied.run("clean_up")
        left = [path.name for path in (copied.folder / "code").rglob("*") if path.is_file()]
        assert left == ["mine.py"]

    def test_a_folder_that_somebody_removed_is_filled_again(self, copied: OneMachine) -> None:
        copied.run("sync_code")
        subprocess.run(["rm", "-r", str(copied.folder / "code")], check=True)
        copied.run("sync_code")
        assert (copied.folder / "code/package/__init__.py").exists()

    def test_clean_up_never_removes_the_code_that_was_packed(self, tmp_path: Path) -> None:
        source = code_in(tmp_path)
        machine = OneMachine(tmp_path, runtime="host", local_code_path=str(source), code_path=str(source))
        machine.run("sync_code")
        machine.run("clean_up")
        assert (source / "package/__init__.py").exists()
        assert (source / "package/__pycache__").exists()

    def test_installed_once_into_a_new_environment(self, tmp_path: Path) -> None:
        machine = machine_with_code(tmp_path)
        # The environment sees this one's packages, so that hatchling builds without an index.
        site = next(path for path in sys.path if path.endswith("site-packages"))
        python = tmp_path / "python"
        path_file = tmp_path / "code/.venv/lib/python3.11/site-packages/x.pth"
        python.write_text(f'#!/bin/sh\n{sys.executable} "$@" && echo {site} > {path_file}\n')
        python.chmod(0o755)
        arguments = ["--no-deps", "--no-build-isolation", "--no-index", "-e", str(tmp_path / "code")]
        more = {"base_python": str(python), "pip_arguments": arguments}
        machine.run("sync_code", "pip_install", **more)
        venv_python = tmp_path / "code/.venv/bin/python"
        command = [str(venv_python), "-c", "import package; print(package.__file__)"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert done.stdout.strip() == str(tmp_path / "code/package/__init__.py")
        assert not any(machine.run("sync_code", "pip_install", **more).num_changed.values())
        machine.run("clean_up")
        assert not (tmp_path / "code").exists()


def test_every_tag_is_there_and_the_rare_ones_never_run_unasked() -> None:
    from omni.deployment.backends.ansible.rendering import PLAYBOOK_FOLDER

    plays = yaml.safe_load((PLAYBOOK_FOLDER / "playbook.yml").read_text())
    tags = [{*play.get("tags", ()), *task.get("tags", ())} for play in plays for task in play["tasks"]]
    rare = {"stop_server", "fetch_log", "clean_up", "remove_docker", "check_hosts", "report", "restart_server"}
    usual = {"run_docker", "sync_code", "pip_install", "ranktable", "run_server", "run_proxy"}
    assert set.union(*tags) == rare | usual | {"always", "never"}
    assert all(("never" in of_task) == bool(of_task & rare) for of_task in tags)
