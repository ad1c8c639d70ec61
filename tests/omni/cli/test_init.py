"""`omni_cli init`: by options, by questions in a terminal, and never over a file that is there."""

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from omni.cli import init as command
from omni.deployment.deployment_file import load_deployment
from omni.deployment.load import load_plan

TIMEOUT_S = 60
REPOSITORY = Path(__file__).parents[3]
EIGHT = ",".join(f"10.0.0.{i}" for i in range(1, 9))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def init(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command.init)
    return CliRunner().invoke(app, arguments)


def read(path: str) -> dict[str, object]:
    content: dict[str, object] = yaml.safe_load(Path(path).read_text())
    return content


def test_the_defaults(here: Path) -> None:
    done = init()
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "1p1d.yaml: 1P1D on one host",
        "next: omni_cli plan 1p1d.yaml; omni_cli doctor 1p1d.yaml; omni_cli serve 1p1d.yaml",
    ]
    assert [path.name for path in here.iterdir()] == ["1p1d.yaml"], "nothing else is left"


def test_a_file_that_plans() -> None:
    assert init("--prefill", "2", "--model", "embedded:tiny", "--name", "chat").exit_code == 0
    plan = load_plan("chat.yaml")
    assert (plan.name, len(plan.processes)) == ("chat", 4)


def test_4p1d_on_npus() -> None:
    options = ("--prefill", "4", "--hosts", EIGHT, "--devices", "0-15", "--model", "/m", "--image", "omni:1")
    done = init(*options, "--user", "admin", "--private-key", "/k", "-o", "big.yaml")
    assert done.exit_code == 0, done.output
    deployment = load_deployment(Path("big.yaml"))
    assert (deployment.name, deployment.backend, deployment.platform) == ("big", "ansible", "npu")
    assert deployment.deployment.decode["group1"].hosts == tuple(EIGHT.split(","))[4:]
    assert deployment.deployment.prefill["group4"].ascend_rt_visible_devices == tuple(range(16))
    assert (deployment.deployment.proxy.user, deployment.deployment.proxy.private_key) == ("admin", "/k")
    assert (deployment.runtime, deployment.services.code_path) == ("docker", None)


def test_hosts_without_an_image_have_a_virtual_environment() -> None:
    assert init("--hosts", EIGHT, "--model", "/m", "--private-key", "/k").exit_code == 0
    deployment = load_deployment(Path("1p1d.yaml"))
    assert (deployment.runtime, deployment.services.code_path) == ("host", "/opt/omni")
    assert deployment.services.local_code_path == str(REPOSITORY)


def test_mixed_alone() -> None:
    assert init("--mixed", "2").exit_code == 0
    deployment = load_deployment(Path("2m.yaml"))
    assert (len(deployment.deployment.mixed), len(deployment.deployment.prefill)) == (2, 0)


def test_kubernetes() -> None:
    assert init("--backend", "kubernetes", "--model", "/m", "--image", "omni:1", "--decode", "2").exit_code == 0
    deployment = load_deployment(Path("1p2d.yaml"))
    assert deployment.deployment.decode["group2"].hosts == ("node3",)
    assert deployment.deployment.proxy.host == "127.0.0.1", "as if it were not written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hosts", EIGHT), "--model: is needed; write it, or run this in a terminal to be asked"),
        (("--backend", "ansible"), "--hosts: is needed; write it, or run this in a terminal to be asked"),
        (("--backend", "kubernetes", "--model", "/m"), "--image: is needed"),
        (("--devices", "0-3"), "--model: is needed"),
        (("--prefill", "0"), "--prefill 0 --decode 1: prefill and decode groups go together"),
        (("--devices", "3-1"), "--devices: '3-1' names no devices or too many; write 0-15"),
        (("--devices", "0-999999"), "--devices: '0-999999' names no devices or too many"),
        (("--devices", "a"), "--devices: 'a' is not a list of devices"),
        (("--devices", "0,0", "--model", "/m", "--mixed", "1"), "names device 0 twice; name each device once"),
        (("--devices", "1,2", "--platform", "cuda", "--model", "/m"), "--devices: on cuda they are counted from 0"),
        (("--platform", "npu"), "--devices: platform npu needs them"),
        (("--platform", "cpu", "--devices", "0", "--model", "/m"), "--devices: platform cpu has none"),
        (("--hosts", "10.0.0.1,", "--model", "/m"), "'10.0.0.1,' is not a list of hosts"),
        (("--hosts", "10.0.0.1,10.0.0.1"), "10.0.0.1 stands twice"),
        (("--hosts", "10.0.0.999", "--model", "/m"), "'10.0.0.999' is not an IPv4 address or host name"),
        (("--hosts", EIGHT, "--backend", "local"), "--hosts: backend local runs on this machine alone"),
        (("--name", "a b"), "name: 'a b' is not a deployment name"),
        (("--model", " "), "--model: an empty value"),
        (("-o", "missing/x.yaml"), "--output: there is no folder missing"),
    ],
)
def test_bad_input_writes_nothing(options: tuple[str, ...], message: str, here: Path) -> None:
    done = init(*options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert ".omni-init-" not in done.stderr
    assert list(here.iterdir()) == []


def test_a_file_that_is_there_stays(here: Path) -> None:
    Path("1p1d.yaml").write_text("mine")
    done = init()
    assert (done.exit_code, done.stderr) == (
        2,
        "--name: 1p1d.yaml is there already; name another with --output, or add --force\n",
    )
    assert Path("1p1d.yaml").read_text() == "mine"
    assert init("--force").exit_code == 0
    assert read("1p1d.yaml")["name"] == "1p1d"
    assert len(list(here.iterdir())) == 1


def test_a_file_that_comes_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_and_be_late(path: Path) -> None:
        Path("mine.yaml").write_text("mine")

    monkeypatch.setattr(command, "load_deployment", load_and_be_late)
    done = init("-o", "mine.yaml")
    assert (done.exit_code, Path("mine.yaml").read_text()) == (2, "mine")
    assert done.stderr.startswith("mine.yaml is there already")


def test_a_file_that_is_there_is_known_before_the_questions() -> None:
    Path("mine.yaml").write_text("mine")
    code, shown = in_a_terminal("", "-o", "mine.yaml")
    assert (code, shown.count("[")) == (2, 0)
    code, shown = in_a_terminal("mine\nother\n", "--mixed", "1", "--backend", "local", "--devices", "", "--model", "/m",
                                "--platform", "cpu")  # fmt: skip
    assert code == 0, shown
    assert "mine.yaml is there already" in shown
    assert load_deployment(Path("other.yaml")).name == "other"


def test_bad_text_does_not_replace_a_good_file() -> None:
    Path("1p1d.yaml").write_text("mine")
    assert init("--force", "--name", "a b", "-o", "1p1d.yaml").exit_code == 2
    assert Path("1p1d.yaml").read_text() == "mine"


def test_help() -> None:
    assert "--private-key" in init("--help").stdout


PROGRAM = "import typer; from omni.cli.init import init; app = typer.Typer(); app.command()(init); app()"


def in_a_terminal(answers: str, *options: str) -> tuple[int, str]:
    """Runs it in a terminal of its own, into which the answers are typed. Returns the code and what was shown."""
    leader, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "dumb", "COLUMNS": "200"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        shown: list[bytes] = []

        def read_all() -> None:
            try:
                while data := os.read(leader, 4096):
                    shown.append(data)
            except OSError:  # the program has ended, and with it its end
                return

        reader = threading.Thread(target=read_all)
        reader.start()
        try:
            os.write(leader, answers.encode())
            code = process.wait(TIMEOUT_S)
        finally:
            process.kill()
            reader.join(TIMEOUT_S)
            os.close(leader)
    return code, b"".join(shown).decode().replace("\r\n", "\n")


def test_questions() -> None:
    """Ansible is asked for hosts and login; a wrong answer is asked for again; an empty one is the default."""
    answers = ["ansible", "10.0.0.1,10.0.0.1", "10.0.0.1,10.0.0.2,10.0.0.3", "x", "2", "", "0-7", "", "/models/m"]
    answers += ["", "admin", "/keys/k", ""]
    code, shown = in_a_terminal("\n".join(answers) + "\n")
    assert code == 0, shown
    assert "10.0.0.1 stands twice; name each host once" in shown
    assert "'x' is not a number of groups" in shown
    deployment = load_deployment(Path("2p1d.yaml"))
    assert (deployment.backend, deployment.platform) == ("ansible", "npu")
    assert [group.hosts for group in deployment.deployment.prefill.values()] == [("10.0.0.1",), ("10.0.0.2",)]
    assert deployment.deployment.decode["group1"].user == "admin"
    assert "password" not in shown.lower()


def test_what_options_say_is_not_asked() -> None:
    code, shown = in_a_terminal("\n", "--mixed", "1", "--backend", "local", "--devices", "", "--model", "embedded:tiny",
                                "--platform", "cpu")  # fmt: skip
    assert code == 0, shown
    assert shown.count("[") == 1, "the name alone"
    assert Path("1m.yaml").is_file()


def test_yes_asks_nothing() -> None:
    code, shown = in_a_terminal("", "--yes")
    assert code == 0, shown
    assert "[" not in shown
