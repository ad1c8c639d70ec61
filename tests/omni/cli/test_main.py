"""The commands: what they print, and exit code 2 with one clear message for what the user can mend."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from omni.cli import main as cli
from omni.deployment import embedded_model, load
from omni.deployment.errors import DeploymentError
from tests.omni.cli.launchers import plan_of, running
from tests.omni.deployment.samples import content, machine, model_folder, put

REPOSITORY = Path(__file__).parents[3]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TIMEOUT_S = 60


def omni_cli(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def a_machine_and_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model", max_position_embeddings=8192)
    monkeypatch.setattr(load, "this_machine", machine)
    monkeypatch.setattr(embedded_model, "ensure_embedded_model", lambda name: folder)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("a_machine_and_a_model")
class TestPlan:
    def test_table(self, config: Path) -> None:
        done = omni_cli("plan", str(config))
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[0].strip().startswith(f"{config.stem}: ")
        for name in ("prefill.group1.rank0", "decode.group1.rank0", "proxy", "total"):
            assert name in done.stdout

    def test_json(self, config: Path) -> None:
        done = omni_cli("plan", "--json", str(config))
        assert done.exit_code == 0, done.output
        plan = json.loads(done.stdout)
        assert plan["name"] == config.stem
        assert plan["processes"][-1]["role"] == "proxy"
        urls = [process["url"] for process in plan["processes"]]
        assert len(set(urls)) == len(urls)
        if config.stem[1] == "p":
            num_groups = [len({p["group"] for p in plan["processes"] if p["role"] == r}) for r in ("prefill", "decode")]
            assert config.stem == "{}p{}d".format(*num_groups)


@pytest.mark.parametrize("command", ["plan", "serve", "demo"])
def test_a_wrong_file_is_one_message(command: str, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(put(content(), "deployment/proxy/listen_port", 99999)))
    done = omni_cli(command, str(config))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "deployment.proxy.listen_port" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_file_that_is_missing_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "omni.cli.main", "serve", "--detach", str(tmp_path / "missing.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_long_messages_are_not_broken_into_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = omni_cli("plan", str(tmp_path / ("x" * 200 + ".yaml")))
    assert ("x" * 200) in done.stderr


def test_no_arguments_show_the_commands() -> None:
    done = omni_cli()
    for command in (
        *("init", "plan", "doctor", "serve", "status", "stop", "restart", "logs", "curl", "bench", "render", "demo"),
        "scale",
    ):
        assert command in done.output
        shown = omni_cli(command, "--help")
        assert shown.exit_code == 0
        assert "Usage" in shown.output


@pytest.mark.parametrize("command", ["status", "stop", "logs"])
def test_nothing_runs(command: str) -> None:
    done = omni_cli(command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "no deployment is running; `omni_cli serve CONFIG` starts one\n"


@pytest.mark.parametrize("arguments", [("status", "other"), ("stop", "other"), ("logs", "--deployment", "other")])
def test_another_one_runs(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with running(plan_of(tmp_path)):
        done = omni_cli(*arguments)
    assert done.exit_code == 2
    assert done.stderr == "no deployment 'other' is running; running: ['trial']\n"


class TestDemo:
    """Whatever happens to its request, the deployment is stopped."""

    @pytest.fixture
    def launcher(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        plan = plan_of(tmp_path)
        monkeypatch.setattr(cli, "load_plan", lambda config: plan)
        monkeypatch.setattr(cli, "check_machine", lambda plan: None)
        monkeypatch.setattr(cli.detached, "start", lambda plan, console: None)
        with running(plan) as deployment:
            yield psutil.Process(deployment.launcher_pid)

    def test_success(self, launcher: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "run_demo", lambda plan, console: console.print("an answer"))
        done = omni_cli("demo", "any.yaml")
        assert (done.exit_code, done.stdout) == (0, "an answer\nstopped\n")
        assert launcher.status() == psutil.STATUS_ZOMBIE

    def test_a_failed_request(self, launcher: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(plan: object, console: object) -> None:
            raise DeploymentError("the proxy answered 503: no")

        monkeypatch.setattr(cli, "run_demo", fail)
        done = omni_cli("demo", "any.yaml")
        assert (done.exit_code, done.stderr) == (2, "the proxy answered 503: no\n")
        assert launcher.status() == psutil.STATUS_ZOMBIE

    def test_a_launcher_that_ended_hides_no_message(
        self, launcher: psutil.Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die_and_fail(plan: object, console: object) -> None:
            launcher.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
            raise DeploymentError("the stream ended")

        monkeypatch.setattr(cli, "run_demo", die_and_fail)
        assert omni_cli("demo", "any.yaml").stderr == "the stream ended\n"
