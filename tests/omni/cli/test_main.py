"""The commands: what they print, and exit code 2 with one clear message for what the user can mend."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from omni.cli import main as cli
from omni.deployment import embedded_model, load
from omni.deployment.backends import local
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import ProcessState, RunFolder
from tests.omni.cli.launchers import all_ready, plan_of, running
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


def test_a_folder_that_cannot_be_written_is_one_message(
    tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir.touch()  # a file where the folder should be
    plan = plan_of(tmp_path)
    monkeypatch.setattr(cli, "load_plan", lambda config: plan)
    monkeypatch.setattr(cli, "check_machine", lambda plan: None)
    for options in ((), ("--quiet",), ("--detach",)):
        done = omni_cli("serve", *options, "x.yaml")
        assert done.exit_code == 2, done.output
        assert str(state_dir) in done.stderr
        assert "Traceback" not in done.output


def test_no_arguments_show_the_commands() -> None:
    done = omni_cli()
    for command in ("plan", "serve", "status", "stop", "logs", "demo"):
        assert command in done.output


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


class TestStatus:
    def test_ready(self, tmp_path: Path) -> None:
        plan = plan_of(tmp_path)
        with running(plan, states=all_ready(plan)) as deployment:
            table, as_json = omni_cli("status"), omni_cli("status", "trial", "--json")
        assert (table.exit_code, as_json.exit_code) == (0, 0)
        assert f"trial: {plan.proxy.url} serves smollm2" in table.stdout
        shown = json.loads(as_json.stdout)
        assert shown["deployment"]["launcher_pid"] == deployment.launcher_pid
        assert [process["name"] for process in shown["processes"]] == [process.name for process in plan.processes]
        assert {process["state"] for process in shown["processes"]} == {"ready"}

    def test_not_ready(self, tmp_path: Path) -> None:
        """One has not begun, one is starting, one ended with its supervisor, which could not write it."""
        plan = plan_of(tmp_path)
        with subprocess.Popen(["/bin/true"]) as ended:
            pass
        states = {
            "d": ProcessState(name="decode.group1.rank0", stage="loading weights", pid=os.getpid()),
            "x": ProcessState(name="proxy", state="ready", pid=ended.pid),
        }
        with running(plan, states=states):
            table, as_json = omni_cli("status"), omni_cli("status", "--json")
        assert (table.exit_code, as_json.exit_code) == (1, 1)
        assert "loading weights" in table.stdout
        assert "ended with its supervisor" in table.stdout
        assert [p["state"] for p in json.loads(as_json.stdout)["processes"]] == ["starting", "starting", "restarting"]


def test_stop_waits_for_the_launcher(tmp_path: Path) -> None:
    with running(plan_of(tmp_path)) as deployment:
        done = omni_cli("stop")
        assert not deployment.is_running
    assert (done.exit_code, done.stdout) == (0, "trial stopped\n")


class TestServe:
    """In the foreground, with a backend that plays a start."""

    @pytest.fixture
    def serve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
        plan = plan_of(tmp_path)
        monkeypatch.setattr(cli, "load_plan", lambda config: plan)
        monkeypatch.setattr(cli, "check_machine", lambda plan: None)

        def invoke(*options: str, code: int = 0) -> Result:
            def play(plan: Any, on_tick: Callable[[], bool] | None = None) -> int:
                if on_tick is not None:
                    assert on_tick()
                    for state in all_ready(plan).values():
                        RunFolder.of(plan.name).write(state)
                    assert not on_tick()
                return code

            monkeypatch.setattr(local, "serve", play)
            return omni_cli("serve", *options, "any.yaml")

        return invoke

    def test_says_when_it_is_ready(self, serve: Callable[..., Result]) -> None:
        done = serve()
        assert done.exit_code == 0, done.output
        assert "proxy ready after 0." in done.stdout
        assert "ready: smollm2 (bfloat16) at http://127.0.0.1:7000; Ctrl-C stops" in done.stdout

    def test_quiet(self, serve: Callable[..., Result]) -> None:
        assert serve("--quiet").output == ""

    @pytest.mark.parametrize("options", [(), ("--quiet",)])
    def test_exit_code(self, serve: Callable[..., Result], options: tuple[str, ...]) -> None:
        assert serve(*options, code=1).exit_code == 1


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
