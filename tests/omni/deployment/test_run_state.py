"""State files: whole or absent, and true only while their launcher lives."""

import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from omni.deployment import run_state
from omni.deployment.run_state import (
    DeploymentState,
    ProcessState,
    RunFolder,
    one_at_a_time,
    running_deployments,
    state_folder,
)
from omni.process import start_ticks


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNI_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def deployment(name: str = "demo", pid: int | None = None) -> DeploymentState:
    pid = pid or os.getpid()
    return DeploymentState(
        name=name,
        config_file="/configs/demo.yaml",
        log_folder="/logs",
        proxy_url="http://127.0.0.1:7000",
        served_model_name="m",
        process_names=("prefill.group1.rank0", "proxy"),
        launcher_pid=pid,
        launcher_start_ticks=start_ticks(pid),
    )


def test_written_and_read(folder: Path) -> None:
    run_folder = RunFolder.of("demo")
    assert run_folder.deployment() is None
    assert run_folder.processes() == {}
    states = {name: ProcessState(name=name, state="ready", pid=7, since_unix_s=1.5) for name in ("proxy", "engine")}
    for state in states.values():
        run_folder.write(state)
    run_folder.write_deployment(deployment())
    assert run_folder.processes() == states
    assert run_folder.deployment() == deployment()
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "demo")] == [0o700, 0o700]
    assert [path.name for path in (folder / "demo").iterdir() if path.name.startswith(".")] == []
    run_folder.remove()
    run_folder.remove()
    assert not (folder / "demo").exists()


def test_a_reader_never_sees_half_of_a_state() -> None:
    run_folder = RunFolder.of("demo")
    names = ["long " * 5000, "short"]
    run_folder.write(ProcessState(name="a", message=names[0]))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for message in names:
                run_folder.write(ProcessState(name="a", message=message))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(run_folder.processes()["a"].message in names for _ in range(500))
    finally:
        stop.set()
        writer.join()


def test_a_state_begins_when_it_changes() -> None:
    first = ProcessState(name="a", since_unix_s=1.0)
    assert first.changed(progress=0.5).since_unix_s == 1.0
    assert first.changed(state="ready").since_unix_s > 1.0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"name": "demo"}', b'{"launcher_start_unix_s": 1.5}', b"\xff"],
    ids=["empty", "half", "a list", "fields missing", "an older version's", "no text"],
)
def test_a_file_that_cannot_be_read_counts_as_none(folder: Path, content: bytes) -> None:
    (folder / "demo").mkdir(parents=True)
    for name in ("deployment.json", "proxy.process.json"):
        (folder / "demo" / name).write_bytes(content.replace(b"name", b"nome"))
    assert RunFolder.of("demo").deployment() is None
    assert RunFolder.of("demo").processes() == {}
    assert list(running_deployments()) == []


def test_running_or_not() -> None:
    own = deployment()
    assert own.is_running
    assert own.launcher_start_ticks is not None
    assert not replace(own, launcher_start_ticks=own.launcher_start_ticks - 1).is_running, "its pid was used again"
    child = subprocess.Popen(["/bin/sleep", "1000"])
    other = deployment(pid=child.pid)
    assert other.is_running
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not other.is_running, "a zombie runs nothing"
    child.wait()
    assert not other.is_running
    assert not deployment(pid=child.pid).is_running, "neither has ticks"


def test_running_deployments(folder: Path) -> None:
    assert list(running_deployments()) == []
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    for state in (deployment("b"), deployment("a"), deployment("dead", ended.pid)):
        RunFolder.of(state.name).write_deployment(state)
    (folder / "stray.txt").touch()
    (folder / "empty").mkdir()
    with one_at_a_time():
        assert [state.name for state in running_deployments()] == ["a", "b"]


def test_one_at_a_time() -> None:
    order = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with one_at_a_time():
            order.append("second")

    thread = threading.Thread(target=second)
    with one_at_a_time():
        thread.start()
        assert entered.wait(30)
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_disk_that_is_full_leaves_the_state_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = RunFolder.of("demo")
    run_folder.write(ProcessState(name="a", pid=1))

    def fail(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        run_folder.write(ProcessState(name="a", pid=2))
    assert run_folder.processes()["a"].pid == 1


def test_where_states_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert state_folder() == tmp_path / "state"
    monkeypatch.delenv("OMNI_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert run_state.state_folder() == Path("/xdg/omni")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert run_state.state_folder() == Path("/home/someone/.local/state/omni")
