"""What a host says of its own runs, and by what it tells one plan from another."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.backends.ansible import host_run
from omni.deployment.backends.ansible.host_run import main, own_part, wait_until_ready, wanted_digest
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from omni.process import start_ticks

RUN = "sample.engines"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_STATE_DIR", str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sample.yml"
    path.write_text(yaml.safe_dump(content()))
    return path


def content() -> dict[str, Any]:
    return {
        "name": "sample",
        "deployment": {
            "prefill": {"group1": {"hosts": "10.0.0.1"}, "group2": {"hosts": "10.0.0.2"}},
            "decode": {"group1": {"hosts": ["10.0.0.3", "10.0.0.4"]}},
            "proxy": {"host": "10.0.0.5", "decode_policy": "round_robin"},
        },
        "services": {"model_path": "/m"},
    }


def running(*states: ProcessState) -> RunFolder:
    """A run whose launcher is this process."""
    folder = RunFolder.of(RUN)
    folder.write_deployment(
        DeploymentState(
            name=RUN,
            config_file="",
            log_folder="",
            proxy_url="",
            served_model_name="",
            process_names=tuple(state.name for state in states),
            launcher_pid=os.getpid(),
            launcher_start_ticks=start_ticks(os.getpid()),
        )
    )
    for state in states:
        folder.write(state)
    return folder


def reported(capsys: pytest.CaptureFixture[str], file: Path) -> dict[str, Any]:
    assert main(["report", RUN, "--file", str(file), "--on", "10.0.0.1"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def settle(file: Path) -> int:
    return main(["settle", RUN, "--file", str(file), "--on", "10.0.0.1"])


READY = ProcessState(name="prefill.group1.rank0", state="ready")


class TestReport:
    def test_nothing_runs(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        assert reported(capsys, file)["verdict"] == "absent"

    def test_of_a_plan_that_was_never_noted(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        running(READY)
        assert reported(capsys, file)["verdict"] == "outdated"

    def test_of_the_plan_that_is_wanted(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        running(READY)
        assert settle(file) == 0
        assert capsys.readouterr().out == "noted\n"
        report = reported(capsys, file)
        assert report["verdict"] == "current"
        assert report["processes"][0]["state"] == "ready"
        assert settle(file) == 0
        assert capsys.readouterr().out == "unchanged\n"

    def test_new_code_is_another_plan(self, capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> None:
        running(READY)
        settle(file)
        capsys.readouterr()
        (tmp_path / "code.digest").write_text("other")
        assert reported(capsys, file)["verdict"] == "outdated"

    def test_what_has_failed_for_good_is_started_again(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        folder = running(READY)
        settle(file)
        capsys.readouterr()
        folder.write(READY.changed(state="failed"))
        assert reported(capsys, file)["verdict"] == "outdated"

    def test_a_process_that_ended_with_its_supervisor(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        running(READY.changed(pid=2**22 + 1))
        assert reported(capsys, file)["processes"][0]["state"] == "restarting"


class TestSettle:
    def test_says_what_failed(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        running(READY.changed(state="failed", message="no memory"))
        assert settle(file) == 1
        assert "prefill.group1.rank0: no memory" in capsys.readouterr().err

    def test_says_that_the_run_has_ended(self, capsys: pytest.CaptureFixture[str], file: Path) -> None:
        assert settle(file) == 1
        assert "has ended" in capsys.readouterr().err

    def test_has_a_deadline(self) -> None:
        folder = running(READY.changed(state="starting"))
        assert "not ready after 0 s: prefill.group1.rank0" in wait_until_ready(folder, 0)


class TestDigest:
    def changed(self, file: Path, data: dict[str, Any], *, host: str = "10.0.0.1", part: str = "engines") -> bool:
        before = wanted_digest(file, host, part)
        other = file.with_name("other.yml")
        other.write_text(yaml.safe_dump(data))
        return wanted_digest(other, host, part) != before

    def test_of_engines_hangs_on_their_group(self, file: Path) -> None:
        data = content()
        data["deployment"]["prefill"]["group1"]["base_api_port"] = 9100
        assert self.changed(file, data)
        assert self.changed(file, content() | {"services": {"model_path": "/n"}})

    def test_of_engines_hangs_on_no_other_host(self, file: Path) -> None:
        data = content()
        data["deployment"]["prefill"]["group3"] = {"hosts": "10.0.0.6"}
        data["deployment"]["proxy"]["decode_policy"] = "least_active"
        assert not self.changed(file, data)
        assert self.changed(file, data, host="10.0.0.5", part="proxy")

    def test_of_engines_hangs_on_where_the_proxy_is(self, file: Path) -> None:
        data = content()
        data["deployment"]["proxy"]["host"] = "10.0.0.7"
        assert self.changed(file, data)

    def test_of_a_group_on_several_hosts(self) -> None:
        for host in ("10.0.0.3", "10.0.0.4"):
            pools = own_part(content(), host, "engines")["deployment"]
            assert pools["decode"] == content()["deployment"]["decode"]
            assert not pools["prefill"]


def test_it_is_what_the_playbook_calls() -> None:
    from omni.deployment.backends.ansible.rendering import PLAYBOOK_FOLDER

    assert host_run.__name__ in (PLAYBOOK_FOLDER / "vars.yml").read_text()
