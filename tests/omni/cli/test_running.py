"""Finding and stopping deployments, and following logs that rotate."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from omni.cli import running
from omni.deployment.errors import DeploymentError
from omni.rotating_log import RotatingLog
from tests.omni.cli.launchers import plan_of, registered
from tests.omni.cli.launchers import running as running_deployment

TIMEOUT_S = 30
REPOSITORY = Path(__file__).parents[3]

# Ignores SIGTERM and has a child; says when it is ready.
DEAF_LAUNCHER = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["/bin/sleep", "1000"]).pid, flush=True)
signal.pause()
"""


def test_several_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with running_deployment(plan) as first, running_deployment(replace(plan, name="other")) as second:
        assert running.find("trial") == first
        assert running.find("other") == second
        with pytest.raises(DeploymentError, match=r"several deployments are running, name one: \['other', 'trial'\]"):
            running.find(None)
        running.stop_all("other")
        assert running.find(None) == first
        running.stop_all("other")


def test_stopping_what_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as ended:
        state = registered(plan_of(tmp_path), ended.pid, {})
    running.stop(state)


def test_a_launcher_that_does_not_stop_is_killed_with_all_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_STOP_TIMEOUT_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", DEAF_LAUNCHER], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        child = psutil.Process(int(launcher.stdout.readline()))
        deployment = registered(plan_of(tmp_path), launcher.pid, {})
        running.stop(deployment)
        assert not deployment.is_running
        assert launcher.wait(TIMEOUT_S) == -signal.SIGKILL
        assert not child.is_running()


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with running_deployment(plan) as deployment:
        plan.proxy.log_file.parent.mkdir()
        plan.proxy.log_file.touch()
        assert running.log_file(deployment, "proxy") == plan.proxy.log_file
        with pytest.raises(DeploymentError, match=r"'typo' has no log in .*/logs; there are \['proxy'\]"):
            running.log_file(deployment, "typo")


@pytest.mark.parametrize(
    ("num_lines", "shown"), [(0, ""), (2, "three\nfour\n"), (99, "one\ntwo\nthree\nfour\n")], ids=str
)
def test_the_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_lines: int, shown: str) -> None:
    (tmp_path / "a.log").write_text("one\ntwo\nthree\nfour\n")
    running.follow({"a": tmp_path / "a.log"}, num_lines=num_lines, forever=False)
    assert capsys.readouterr().out == shown


def test_several_logs_name_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.log").write_bytes(b"one\r\n\xff\nunfinished")
    (tmp_path / "b.log").write_bytes(b"")
    running.follow({"a": tmp_path / "a.log", "b": tmp_path / "b.log"}, num_lines=20, forever=False)
    assert capsys.readouterr().out == "a: one\na: \N{REPLACEMENT CHARACTER}\na: unfinished\n"


class Follower:
    """`omni_cli logs -f` in a process of its own."""

    def __init__(self, folder: Path, *names: str) -> None:
        deployment = folder / "state"
        command = [sys.executable, "-m", "omni.cli.main", "logs", "-f", *names]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, "OMNI_STATE_DIR": str(deployment)}, stdout=subprocess.PIPE
        )
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.decode().rstrip("\n"))
                self._grown.notify()

    def wait_for(self, last: str) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: self.lines[-1:] == [last], TIMEOUT_S), self.lines

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(TIMEOUT_S)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


Follow = Callable[..., Follower]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    """Follow logs of a running deployment; ends with Ctrl-C, which is no failure."""
    followers: list[Follower] = []
    # A shell's background jobs ignore SIGINT, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*names: str) -> Follower:
        followers.append(Follower(tmp_path, *names))
        return followers[-1]

    try:
        with running_deployment(plan_of(tmp_path)):
            yield start
            codes = [follower.close() for follower in followers]
    finally:
        signal.signal(signal.SIGINT, before)
        for follower in followers:
            follower.process.kill()
    assert codes == [0]


def test_following_through_rotation(tmp_path: Path, follow: Follow) -> None:
    log = RotatingLog(tmp_path / "logs" / "proxy.log", max_bytes=100, num_old=3)
    log.write(b"earlier\n")
    follower = follow("proxy")
    follower.wait_for("earlier")
    expected = ["earlier"]
    for number in range(10):
        lines = [f"line {number} {part}" for part in range(4)]  # 36 bytes
        log.write("".join(line + "\n" for line in lines[:2]).encode())
        log.write("".join(line + "\n" for line in lines[2:]).encode())
        expected += lines
        follower.wait_for(expected[-1])
    log.close()
    assert follower.lines == expected
    assert (tmp_path / "logs" / "proxy.log.3").exists()


def test_following_an_unfinished_line(tmp_path: Path, follow: Follow) -> None:
    log = RotatingLog(tmp_path / "logs" / "proxy.log", max_bytes=24)
    log.write(b"first\nhalf a ")
    follower = follow("proxy")
    follower.wait_for("first")
    log.write(b"line")
    time.sleep(0.5)  # nothing may come meanwhile
    log.write(b", the rest in another file\n")
    log.close()
    follower.wait_for("half a line, the rest in another file")
    assert follower.lines == ["first", "half a line, the rest in another file"]


def test_following_all_logs(tmp_path: Path, follow: Follow) -> None:
    logs = [
        RotatingLog(tmp_path / "logs" / f"{name}.log")
        for name in ("prefill.group1.rank0", "decode.group1.rank0", "proxy")
    ]
    logs[0].write(b"begun\n")
    follower = follow()
    follower.wait_for("prefill.group1.rank0: begun")
    for log in logs:
        log.write(b"hello\n")
        follower.wait_for(f"{log.path.name.removesuffix('.log')}: hello")
        log.close()
