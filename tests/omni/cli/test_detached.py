"""A start in the background: it waits for readiness, and leaves nothing behind when it fails."""

import io
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from omni.cli import detached
from omni.cli.progress import StartProgress
from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import ProcessState, RunFolder
from tests.omni.cli.launchers import launcher_script, plan_of, running, writes_ready_states

TIMEOUT_S = 30


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    return plan_of(tmp_path)


def start(plan: LaunchPlan, **options: Any) -> str:
    output = io.StringIO()
    detached.start(plan, Console(file=output, width=200), **options)
    return output.getvalue()


def use_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(sys, "executable", str(launcher_script(folder, body=body)))


def pid_in(folder: Path) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int((folder / "pid").read_text())


def test_the_launcher_goes_on_by_itself(plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_launcher(tmp_path, monkeypatch, f"echo $@\n{writes_ready_states(plan)}\nexec sleep 1000")
    output = start(plan)
    pid = pid_in(tmp_path)
    assert os.getsid(pid) == pid, "Ctrl-C in this terminal is not for it"
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [line.split(" ready after ")[0] for line in output.splitlines()] == [p.name for p in plan.processes]
    assert (tmp_path / "logs" / "launcher.log").read_text() == f"-m omni.cli.main serve --quiet {plan.config_file}\n"


def test_what_a_killed_launcher_left_is_not_taken_for_ready(
    plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for process in plan.processes:
        RunFolder.of(plan.name).write(ProcessState(name=process.name, state="ready"))
    use_launcher(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(DeploymentError, match="trial did not start"):
        start(plan)


def test_a_launcher_that_fails_shows_its_last_lines(plan: LaunchPlan, tmp_path: Path) -> None:
    """The real one, with a file that it refuses."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("deployment: 5\n")
    with pytest.raises(DeploymentError) as caught:
        start(replace(plan, config_file=bad))
    first, *said, last = str(caught.value).splitlines()
    assert first == "trial did not start:"
    assert any("bad.yaml, line 1: deployment: " in line for line in said)
    assert last == f"(all of it: {tmp_path}/logs/launcher.log)"
    assert "Traceback" not in str(caught.value)


def test_one_that_runs_already(plan: LaunchPlan) -> None:
    with (
        running(plan) as deployment,
        pytest.raises(DeploymentError, match=rf"'trial' is running already \(pid {deployment.launcher_pid}\).*stop"),
    ):
        start(plan)


def test_not_ready_in_time(plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_launcher(tmp_path, monkeypatch, "exec sleep 1000")
    with pytest.raises(DeploymentError, match=r"trial was not ready after 0.2 s, and is stopped .*; see .*/logs"):
        start(plan, timeout_s=0.2)
    assert not psutil.pid_exists(pid_in(tmp_path))


def test_ctrl_c_while_it_starts_stops_it(plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_launcher(tmp_path, monkeypatch, "exec sleep 1000")

    def interrupted(progress: StartProgress) -> bool:
        pid_in(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(StartProgress, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(plan)
    assert not psutil.pid_exists(pid_in(tmp_path))
