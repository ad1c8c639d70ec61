"""`serve`, `stop` and `render`: here, one host's part, and by a backend that plays a start elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from omni.cli import detached
from omni.cli import main as cli
from omni.cli import serve as commands
from omni.deployment import load
from omni.deployment.backends import Say, local
from omni.deployment.errors import ConfigError, DeploymentError, Problem
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from tests.omni.cli.launchers import all_ready, plan_of, running
from tests.omni.deployment.samples import content, machine, model, put


def omni_cli(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def test_a_folder_that_cannot_be_written_is_one_message(
    tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir.touch()  # a file where the folder should be
    plan = plan_of(tmp_path)
    monkeypatch.setattr(commands, "load_plan", lambda config: plan)
    monkeypatch.setattr(commands, "check_machine", lambda plan: None)
    for options in ((), ("--quiet",), ("--detach",)):
        done = omni_cli("serve", *options, "x.yaml")
        assert done.exit_code == 2, done.output
        assert str(state_dir) in done.stderr
        assert "Traceback" not in done.output


@pytest.mark.parametrize(("options", "timeout_s"), [((), 3600.0), (("--start-timeout-s", "7200"), 7200.0)], ids=str)
def test_how_long_detach_waits(
    options: tuple[str, ...], timeout_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(commands, "load_plan", lambda config: plan_of(tmp_path))
    monkeypatch.setattr(commands, "check_machine", lambda plan: None)
    monkeypatch.setattr(detached, "start", lambda *_, timeout_s, **__: waited.append(timeout_s))
    assert omni_cli("serve", "--detach", *options, "x.yaml").exit_code == 0
    assert waited == [timeout_s]


def test_stop_waits_for_the_launcher(tmp_path: Path) -> None:
    with running(plan_of(tmp_path)) as deployment:
        done = omni_cli("stop")
        assert not deployment.is_running
    assert (done.exit_code, done.stdout) == (0, "trial stopped\n")


class TestHere:
    """In the foreground, with a local backend that plays a start."""

    @pytest.fixture
    def serve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
        plan = plan_of(tmp_path)
        monkeypatch.setattr(commands, "load_plan", lambda config: plan)
        monkeypatch.setattr(commands, "check_machine", lambda plan: None)

        def invoke(*options: str, code: int = 0) -> Result:
            def play(plan: Any, *, on: str | None, on_tick: Callable[[], bool] | None = None) -> int:
                assert on is None
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

    def test_brackets_in_names_are_shown(
        self, serve: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = replace(plan_of(tmp_path), served_model_name="m[/b][q4]:x:")
        monkeypatch.setattr(commands, "load_plan", lambda config: plan)
        done = serve()
        assert done.exit_code == 0, done.output
        assert "ready: m[/b][q4]:x: (bfloat16)" in done.stdout

    def test_quiet(self, serve: Callable[..., Result]) -> None:
        assert serve("--quiet").output == ""

    @pytest.mark.parametrize("options", [(), ("--quiet",)])
    def test_exit_code(self, serve: Callable[..., Result], options: tuple[str, ...]) -> None:
        assert serve(*options, code=1).exit_code == 1


@pytest.fixture
def two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """P and the proxy on one host, D on another."""
    monkeypatch.setattr(load, "read_model_info", lambda folder: model(path=folder))
    monkeypatch.setattr(load, "this_machine", machine)
    monkeypatch.setattr(commands, "check_machine", lambda plan: None)
    data = put(content(), "deployment/decode/group1/hosts", "198.51.100.7")
    put(data, "services/log_path", str(tmp_path / "logs"))
    file = tmp_path / "pair.yaml"
    file.write_text(yaml.safe_dump(data | {"backend": "ansible"}))
    return file


@pytest.mark.parametrize(
    ("options", "name", "processes"),
    [
        (("--on", "127.0.0.1"), "pair", ["prefill.group1.rank0", "proxy"]),
        (("--on", "127.0.0.1", "--part", "engines"), "pair.engines", ["prefill.group1.rank0"]),
        (("--on", "127.0.0.1", "--part", "proxy"), "pair.proxy", ["proxy"]),
        (("--on", "198.51.100.7"), "pair", ["decode.group1.rank0"]),
    ],
)
def test_one_host_s_part(
    two_hosts: Path, options: tuple[str, ...], name: str, processes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[LaunchPlan] = []

    def play(plan: LaunchPlan, *, on: str) -> int:
        assert on == options[1]
        served.append(plan)
        return 0

    monkeypatch.setattr(local, "serve", play)
    done = omni_cli("serve", str(two_hosts), "--quiet", *options)
    assert done.exit_code == 0, done.output
    assert served[0].folder_name == name
    assert [process.name for process in served[0].processes] == processes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--part", "engines"), "--part: goes with --on HOST"),
        (("--on", "127.0.0.1", "--part", "all"), "--part: 'all' is not one of engines, proxy"),
        (("--on", "198.51.100.7", "--part", "proxy"), "--on: 198.51.100.7 has no proxy in "),
        (("--on", "10.1.1.1"), "--on: 10.1.1.1 is no host of the deployment file; write one of 127.0.0.1, 198.51"),
    ],
)
def test_no_such_part(two_hosts: Path, options: tuple[str, ...], words: str) -> None:
    done = omni_cli("serve", str(two_hosts), *options)
    assert done.exit_code == 2
    assert words in done.stderr


class Elsewhere:
    """A backend that starts nothing and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def render(self, plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        self.asked.append(f"render {plan.name}")
        return (folder / "one.yaml",)

    def serve(self, plan: LaunchPlan, say: Say) -> DeploymentState:
        self.asked.append(f"serve {plan.name}")
        say("starting [all] of it")
        return DeploymentState(
            name=plan.name,
            config_file=str(plan.config_file),
            log_folder="logs",
            proxy_url=plan.proxy.url,
            served_model_name=plan.served_model_name,
            process_names=tuple(process.name for process in plan.processes),
            launcher_pid=0,
            launcher_start_ticks=None,
            backend="ansible",
        )

    def stop(self, deployment: DeploymentState, say: Say) -> None:
        self.asked.append(f"stop {deployment.name}")

    def scale(self, deployment: DeploymentState, num_groups: Mapping[str, int], wait_s: float, say: Say) -> None:
        self.asked.append(f"scale {num_groups}")

    def restart(self, deployment: DeploymentState, names: Sequence[str], say: Say) -> None:
        self.asked.append(f"restart {names}")

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        return [ProcessState(name=name, state="ready") for name in deployment.process_names]

    def fetch_logs(self, deployment: DeploymentState, folder: Path) -> None:
        for name in deployment.process_names[:2]:
            (folder / f"{name}.log").write_text(f"line of {name}\n")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    backend = Elsewhere()
    for module in ("serve", "logs", "scale"):
        monkeypatch.setattr(f"omni.cli.{module}.remote_backend", lambda name: backend)
    return backend


def test_another_backend_s_life(two_hosts: Path, elsewhere: Elsewhere, tmp_path: Path) -> None:
    done = omni_cli("serve", str(two_hosts))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("starting [all] of it\nready after 0 s: smollm2 at http://127.0.0.1:7000; ")
    assert RunFolder.of("pair").deployment() is not None
    assert omni_cli("logs").stdout == (
        "prefill.group1.rank0: line of prefill.group1.rank0\ndecode.group1.rank0: line of decode.group1.rank0\n"
    )
    kept = omni_cli("logs", "decode.group1.rank0", "--output", str(tmp_path / "kept"))
    assert kept.stdout == "line of decode.group1.rank0\n"
    assert (tmp_path / "kept" / "decode.group1.rank0.log").is_file()
    assert "no log; there are ['decode.group1.rank0'" in omni_cli("logs", "nobody").stderr
    assert "--follow: " in omni_cli("logs", "-f").stderr
    assert omni_cli("logs", "-n", "-1").exit_code == 2
    assert omni_cli("scale", "decode=2").exit_code == 0
    assert omni_cli("stop").stdout == "pair stopped\n"
    assert RunFolder.of("pair").deployment() is None
    assert elsewhere.asked == ["serve pair", "scale {'decode': 2}", "stop pair"]


def test_what_a_backend_refuses_names_the_line(
    two_hosts: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        raise ConfigError([Problem("services.model_path", "is nowhere", "mend it")])

    monkeypatch.setattr(elsewhere, "render", refuse)
    done = omni_cli("render", str(two_hosts), "-o", "x")
    assert done.exit_code == 2
    assert "pair.yaml, line " in done.stderr
    assert "services.model_path: is nowhere; mend it" in done.stderr


def test_render(two_hosts: Path, elsewhere: Elsewhere) -> None:
    done = omni_cli("render", str(two_hosts), "--output", "fol[/d]er")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("fol[/d]er/one.yaml\n1 files for 3 processes, ")
    assert (
        "--backend: 'slurm' is not known" in omni_cli("render", str(two_hosts), "-o", "x", "--backend", "slurm").stderr
    )


def test_backend_local_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of(tmp_path))
    monkeypatch.setattr(commands, "load_plan", lambda config, backend: plan)
    done = omni_cli("render", "any.yaml", "-o", "x")
    assert done.exit_code == 2
    assert "backend local has nothing to write" in done.stderr


def test_a_name_that_runs_by_another_backend(
    two_hosts: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert omni_cli("serve", str(two_hosts)).exit_code == 0
    two_hosts.write_text(two_hosts.read_text().replace("backend: ansible", "backend: ray"))
    done = omni_cli("serve", str(two_hosts))
    assert done.exit_code == 2
    assert "deployment 'pair' runs by backend ansible: `omni_cli stop pair` first" in done.stderr


def test_an_error_of_the_backend_is_one_message(
    two_hosts: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: LaunchPlan, say: Say) -> DeploymentState:
        raise DeploymentError("198.51.100.7 cannot be reached")

    monkeypatch.setattr(elsewhere, "serve", fail)
    done = omni_cli("serve", str(two_hosts))
    assert (done.exit_code, done.stderr) == (2, "198.51.100.7 cannot be reached\n")
