"""What is refused before vLLM is imported, and the fork: what the child has of its parent, and what not."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from omni.deployment.errors import DeploymentError
from omni.deployment.groups import Pool
from omni.process import remove_traces
from services import engine_host
from tests.omni.deployment.samples import content, model, model_folder, put

TIMEOUT_S = 60
REPOSITORY = Path(__file__).parents[2]

FORKS_AND_RAISES = """
import os, sys
from omni.process import remove_traces
from services import engine_host
def serve():
    {body}
reader, writer = os.pipe()
pid = engine_host._fork(serve, writer)
os.close(writer)
with open(reader, "rb") as output:
    sys.stdout.buffer.write(output.read())
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
remove_traces(pid)
sys.exit(code)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model = model_folder(tmp_path / "model", architectures=["LlamaForCausalLM"])
    data = put(content(prefill=2), "services/model_path", str(model))
    put(data, "services/log_path", str(tmp_path / "logs"))
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize(("service", "has"), [("prefill", "['group1', 'group2']"), ("decode", "['group1']")])
def test_a_group_that_does_not_exist(service: str, has: str, config: Path) -> None:
    command = [sys.executable, "-m", f"services.{service}", "--config", str(config), "--group", "group9"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert done.stderr == f"--group: there is no {service} group 'group9'; the deployment file has {has}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml"),
        ([], "--config"),
        (["--config", "a.yaml", "--group", "group1"], "--group"),  # for services.prefill and .decode alone
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_host", *arguments])
    try:
        code: object = engine_host.main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def engines(role: Pool | None, file: Path, *arguments: str) -> list[str]:
    args = engine_host._parser(role).parse_args(["--config", str(file), *arguments])
    return [engine.name for engine in engine_host._engines(args, role)[1]]


def test_which_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.deployment.load.read_model_info", lambda folder: model(path=folder))
    file = tmp_path / "deploy.yml"
    data = put(content(prefill=2), "services/prefill/data_parallel_size", 2)
    put(data, "deployment/prefill/group2/hosts", "127.0.0.1,127.0.0.2")
    file.write_text(yaml.safe_dump(data | {"backend": "ansible"}))
    assert engines(None, file, "--on", "127.0.0.2") == ["prefill.group2.rank1"]
    node = ("--listen", "127.0.0.1", "--node", "1", "--master", "192.0.2.1", "--join", "proxy:7001")
    assert engines("prefill", file, "--group", "group2", *node) == ["prefill.group2.rank1"]
    with pytest.raises(DeploymentError, match="--on HOST: is needed with backend ansible"):
        engines(None, file)
    with pytest.raises(DeploymentError, match="--listen ADDRESS: is needed with backend ansible"):
        engines("prefill", file, "--group", "group2")
    with pytest.raises(DeploymentError, match="--master: goes with --listen ADDRESS"):
        engines("prefill", file, "--group", "group2", "--master", "192.0.2.1")
    put(data, "deployment/prefill/group2/hosts", "127.0.0.1")
    file.write_text(yaml.safe_dump(data))
    assert engines(None, file) == [
        *("prefill.group1.rank0", "prefill.group1.rank1", "prefill.group2.rank0", "prefill.group2.rank1"),
        "decode.group1.rank0",
    ]
    assert engines("prefill", file, "--group", "group2") == ["prefill.group2.rank0", "prefill.group2.rank1"]
    with pytest.raises(DeploymentError, match=r"--group: there is no decode group 'group2'"):
        engines("decode", file, "--group", "group2")


@pytest.mark.parametrize(("option", "text"), [("--base-api-port", "99999"), ("--join", "nonsense"), ("--join", ":1")])
def test_options_that_are_refused(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine_host._parser("decode").parse_args(["--config", "x", "--group", "group1", option, text])
    assert repr(text) in capsys.readouterr().err


def test_the_network_of_the_file_s_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
    monkeypatch.setattr(os, "environ", {"TP_SOCKET_IFNAME": "chosen"})
    engine_host._choose_interface("127.0.0.1")
    assert [os.environ[name] for name in names] == ["lo", "chosen", "lo"]
    assert os.environ["HCCL_IF_IP"] == "127.0.0.1"
    monkeypatch.setattr(os, "environ", {})
    engine_host._choose_interface("198.51.100.200")  # nobody's here
    assert not os.environ


def forked(serve: Callable[[], None]) -> tuple[int, str]:
    """Exit code and output of a child."""
    reader, writer = os.pipe()
    pid = engine_host._fork(serve, writer)
    os.close(writer)
    with open(reader, "rb") as output:
        said = output.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    remove_traces(pid)
    return code, said


def test_output_goes_to_the_pipe() -> None:
    def serve() -> None:
        os.write(1, b"to stdout, ")
        os.write(2, b"to stderr")

    assert forked(serve) == (0, "to stdout, to stderr")


def test_the_child_has_no_descriptor_of_the_supervisor() -> None:
    """Neither a listening socket nor another child's pipe, which would never end then."""
    reader, writer = os.pipe()
    with socket.socket() as listener, open(reader, "rb"), open(writer, "wb"):
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            still_open = [number for number in range(3, 1000) if os.path.exists(f"/proc/self/fd/{number}")]
            os.write(1, str(still_open).encode())

        assert forked(serve) == (0, "[]")


def test_the_child_answers_signals_by_itself() -> None:
    """Its parent's handlers and the descriptor they write to are not its own; an ignored signal stays ignored."""
    swallowed = []
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: swallowed.append("TERM")),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: swallowed.append("INT")),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    }
    wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK)
    before_fd = signal.set_wakeup_fd(wake_writer)

    def serve() -> None:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.write(1, f"{[int(handler) for handler in handlers]} {mask} {signal.set_wakeup_fd(-1)}".encode())

    try:
        assert forked(serve) == (0, f"{[int(n) for n in (signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN)]} set() -1")
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake_reader)
        os.close(wake_writer)
    assert swallowed == []


def test_sigterm_right_after_the_fork_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as the supervisor's: it only takes note
    fork = os.fork

    def fork_and_stop() -> int:
        pid = fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_stop)
    try:
        assert forked(lambda: time.sleep(5)) == (-signal.SIGTERM, "")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_child_dies_with_its_parent() -> None:
    def serve() -> None:
        import ctypes

        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)  # PR_GET_PDEATHSIG
        os.write(1, str(number.value).encode())

    assert forked(serve) == (0, str(int(signal.SIGKILL)))


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('unflushed', end='')", 0, "unflushed"),
        ("sys.exit()", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
        ("sys.stdout.close()", 0, ""),  # what then fails at the end must not run the parent's code
        ("sys.stdout.write('lost'); os.close(1)", 0, ""),
    ],
)
def test_exit_codes(body: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS_AND_RAISES.format(body=body)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.endswith(said)
    assert bool(done.stdout) is bool(said)
