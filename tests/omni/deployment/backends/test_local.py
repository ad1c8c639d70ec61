"""The local backend with the real engine host, refused before it imports vLLM, and stand-ins for it and the proxy."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from omni.deployment.backends import local
from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import RunFolder, running_deployments
from tests.omni.deployment.samples import content, planned, put

PROXY = """
import http.server, os, sys
from omni.process import obey_parent
obey_parent()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/live" else 404)
        self.end_headers()
own_group, own_session = os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()
print(os.environ["FROM_THE_PLAN"], own_group, own_session, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNI_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def plan(tmp_path: Path, free_ports: Callable[[int], int]) -> Iterator[LaunchPlan]:
    """Its proxy is a small server; its deployment file names no model that exists. Fails when a process is left."""
    children = psutil.Process().children()  # of other tests
    port = free_ports(1)
    plan = planned(tmp_path, put(content(), "services/log_path", str(tmp_path / "logs")))
    command = (sys.executable, "-c", PROXY, str(port))
    proxy = replace(plan.proxy, port=port, command=command, env={"FROM_THE_PLAN": "yes"})
    yield replace(plan, processes=(*plan.processes[:-1], proxy))
    assert psutil.Process().children() == children


def test_an_engine_host_that_refuses_ends_it_all(
    plan: LaunchPlan, tmp_path: Path, state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.serve(plan) == 1
    report = capsys.readouterr().err
    assert "engine_host exited with code 2 after " in report
    assert "services.model_path: " in report
    assert "Traceback" not in report
    assert "services.model_path: " in (tmp_path / "logs" / "engine_host.log").read_text()
    assert not (state_dir / plan.name).exists()


def test_until_sigterm(plan: LaunchPlan, tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_host = tmp_path / "engine_host.sh"
    engine_host.write_text('#!/bin/sh\necho "$@"\nexec sleep 1000\n')
    engine_host.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine_host))
    seen = []

    def tick() -> bool:
        states = RunFolder.of(plan.name).processes()
        if len(states) < 2 or any(state.state != "ready" for state in states.values()):
            return True
        seen.extend(running_deployments())
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    assert local.serve(plan, on_tick=tick) == 0
    (deployment,) = seen
    assert (deployment.name, deployment.launcher_pid) == ("trial", os.getpid())
    assert deployment.process_names == ("prefill.group1.rank0", "decode.group1.rank0", "proxy")
    assert (tmp_path / "logs" / "proxy.log").read_text().startswith("yes True False\n")
    said = (tmp_path / "logs" / "engine_host.log").read_text()
    assert said == f"-m services.engine_host --config {plan.config_file}\n"
    assert not (state_dir / plan.name).exists()


def test_one_of_that_name_runs(plan: LaunchPlan) -> None:
    folder = local.claim_folder(plan, state=local._state(plan))
    with pytest.raises(
        DeploymentError, match=rf"'trial' is running already \(pid {os.getpid()}\): `omni_cli stop trial`"
    ):
        local.serve(plan)
    assert folder.deployment() is not None, "the one that runs keeps its state"


def test_two_at_the_same_time(plan: LaunchPlan, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether one runs and taking its place are one step for other launchers."""
    steps = []

    def locked(name: str) -> Callable[..., object]:
        method = getattr(RunFolder, name)

        def step(*args: object) -> object:
            with (state_dir / ".lock").open("wb") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            steps.append(name)
            return method(*args)

        return step

    for name in ("deployment", "remove", "write_deployment"):
        monkeypatch.setattr(RunFolder, name, locked(name))
    local.claim_folder(plan, state=local._state(plan))
    assert steps == ["deployment", "remove", "write_deployment"]


def test_what_a_killed_launcher_left_is_removed(plan: LaunchPlan) -> None:
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    folder = RunFolder.of(plan.name)
    folder.write_deployment(replace(local._state(plan), launcher_pid=ended.pid))
    (folder.path / "proxy.process.json").write_text("{}")
    assert list(local.claim_folder(plan).path.parent.glob("trial")) == []


def test_a_program_that_is_not_there(plan: LaunchPlan, tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output, pytest.raises(FileNotFoundError):
        local._spawn((str(tmp_path / "missing"),), {}, output.fileno())
