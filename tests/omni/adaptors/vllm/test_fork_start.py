"""Executing again with an environment, and forks that let go of what is not theirs. One test imports vLLM."""

import os
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from omni.adaptors.vllm import fork_start

TIMEOUT_S = 120
REPOSITORY = Path(__file__).parents[4]

EXECUTES_ITSELF_AGAIN = """
import os, sys
from omni.adaptors.vllm import fork_start
before = os.environ.get("BEFORE", str(os.getpid()))
fork_start.exec_with({"TORCH_COMPILE_DISABLE": "1", "BEFORE": before})
fork_start.exec_with({"TORCH_COMPILE_DISABLE": "1"})
print(before == str(os.getpid()), os.environ["TORCH_COMPILE_DISABLE"], sys.argv[1:], sys.flags.isolated)
"""
# A process of vLLM's: which method starts it, what kills it, and that it begins where its parent stood.
FORKS_AS_VLLM_DOES = """
import ctypes, importlib, os
from omni.adaptors.vllm import fork_start
fork_start.use_fork()
contexts = {importlib.import_module(name).get_mp_context() for name in fork_start._START_METHOD_MODULES}
(context,) = contexts
memory = []
def child():
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0)
    print(context.get_start_method(), number.value, memory, os.sched_getaffinity(0) == {first_core}, flush=True)
first_core = min(os.sched_getaffinity(0))
os.environ["GOMP_CPU_AFFINITY"] = str(first_core)
memory.append("seen")
process = context.Process(target=child, name="VllmWorker-0")
process.start()
process.join()
import torch
print(process.exitcode, torch.get_num_threads() > 0, len(os.sched_getaffinity(0)) >= 1)
importlib.import_module("vllm.v1.engine.utils").__dict__.pop("get_mp_context")
try:
    fork_start.use_fork()
except RuntimeError as error:
    print(error)
"""


def run_python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_executes_again_once_and_keeps_pid_and_arguments() -> None:
    assert run_python("-c", EXECUTES_ITSELF_AGAIN, "--option", "value") == "True 1 ['--option', 'value'] 0\n"


def test_exec_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    env = fork_start.exec_environment(eager=True)
    assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == "1"
    assert env["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in fork_start.exec_environment(eager=False)
    assert "libgomp" in env["LD_PRELOAD"]
    assert Path(env["LD_PRELOAD"]).is_file()


def test_the_environment_does_not_change_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the program would execute itself for ever."""
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    for name, value in fork_start.exec_environment(eager=True).items():
        monkeypatch.setenv(name, value)
    assert os.environ["LD_PRELOAD"].endswith(":libother.so")
    second = fork_start.exec_environment(eager=True)
    assert all(os.environ[name] == value for name, value in second.items())


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "LD_PRELOAD" not in fork_start.exec_environment(eager=True)


def _descriptors_after_closing(writer: int, keep: list[int]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    fork_start._close_listening_sockets()
    after = set(os.listdir("/proc/self/fd"))
    kept = all(str(descriptor) in after for descriptor in keep)
    os.write(writer, f"{len(before - after)} closed, {len(after - before)} new, kept {kept}".encode())


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_fork_lets_go_of_sockets_for_listening_alone(family: socket.AddressFamily, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with (
        socket.socket(family) as listener,
        socket.socket(socket.AF_UNIX) as local_listener,
        socket.socket() as unbound,
        socket.socket(family) as bound,
        open(reader, "rb") as output,
    ):
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        bound.bind((listener.getsockname()[0], 0))  # and not listening yet
        local_listener.bind(str(tmp_path / "socket"))  # vLLM's own, between its processes
        local_listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client, listener.accept()[0] as accepted:
            keep = [item.fileno() for item in (local_listener, unbound, client, accepted)] + [reader, writer]
            process = get_context("fork").Process(target=_descriptors_after_closing, args=(writer, keep))
            process.start()
            os.close(writer)
            process.join()
        assert output.read() == b"2 closed, 0 new, kept True"


def test_no_cores_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.delenv("GOMP_CPU_AFFINITY", raising=False)
    fork_start.bind_threads()
    assert os.sched_getaffinity(0) == before


def test_vllm_forks_its_processes() -> None:
    *said, method, parent, refused = run_python("-c", FORKS_AS_VLLM_DOES).splitlines()
    assert method == "fork 9 ['seen'] True"
    assert parent == "0 True True"
    expected = "vllm.v1.engine.utils.get_mp_context is gone: this vLLM release starts its processes in another way"
    assert refused == expected, said
