"""The supervisor over real processes."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from omni import supervisor as supervisor_module
from omni.deployment.run_state import RunFolder
from omni.supervisor import Supervisor
from tests.omni.supervised import TIMEOUT_S, Steps, Trial, python, shell, wait

# Says what it does, waits for a file before each step, then answers on a port.
STAGED_SERVER = """
import http.server, os, sys, time
port, folder = int(sys.argv[1]), sys.argv[2]
def wait_for(name):
    while not os.path.exists(os.path.join(folder, name)):
        time.sleep(0.01)
print("first stage", flush=True)
wait_for("second")
print("second stage", flush=True)
wait_for("serve")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists(os.path.join(folder, "ready")) else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
IGNORES_SIGTERM = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
signal.pause()
"""
FLOODS_ON_SIGTERM = """
import os, signal, sys
def flood(*_):
    for _ in range(64):
        os.write(1, b"x" * 16383 + b"\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, flood)
print("up", flush=True)
while True:
    signal.pause()
"""
SUPERVISES_ONE_CHILD = '''
import sys
from functools import partial
from pathlib import Path
from omni.deployment.backends.local import _spawn
from omni.deployment.run_state import RunFolder
from omni.supervisor import Child, Supervisor
child = """
import os, time
from omni.process import obey_parent
obey_parent()
print(os.getpid(), flush=True)
time.sleep(1000)
"""
start = partial(_spawn, (sys.executable, "-c", child), {})
Supervisor([Child(name="c", start=start, log_file=Path(sys.argv[1]))], RunFolder(Path(sys.argv[2]))).run()
'''


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    """Fails when the supervisor leaves a process, a descriptor or a handler behind."""
    monkeypatch.setattr(supervisor_module, "_TICK_S", 0.01)
    monkeypatch.setattr(supervisor_module, "_FIRST_BACKOFF_S", 0.02)
    children = psutil.Process().children()  # of other tests
    descriptors = set(os.listdir("/proc/self/fd"))
    handlers = [signal.getsignal(number) for number in supervisor_module.STOP_SIGNALS]
    yield Trial(tmp_path)
    assert signal.set_wakeup_fd(-1) == -1
    assert psutil.Process().children() == children
    assert set(os.listdir("/proc/self/fd")) <= descriptors  # fewer: what earlier tests have left to the collector
    assert [signal.getsignal(number) for number in supervisor_module.STOP_SIGNALS] == handlers


def test_ready_by_url_through_stages(
    trial: Trial, free_ports: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked for the machine's own children
    port = free_ports(1)
    stages = ((b"first stage", 0.2, "one"), (b"second stage", 0.6, "two"))
    child = trial.child(
        "a",
        python(STAGED_SERVER, str(port), str(trial.folder)),
        ready_url=f"http://127.0.0.1:{port}/health",
        stages=stages,
    )

    def steps() -> Steps:
        yield from wait(lambda: trial.state().stage == "one")
        assert trial.state().progress == 0.2
        (trial.folder / "second").touch()
        yield from wait(lambda: trial.state().stage == "two")
        (trial.folder / "serve").touch()
        yield from wait(lambda: '" 503' in trial.log())  # asked, and not ready
        assert trial.state().state == "starting"
        (trial.folder / "ready").touch()
        yield from wait(lambda: trial.state().state == "ready")
        assert (trial.state().progress, trial.state().restarts) == (1.0, 0)
        assert trial.state().pid is not None

    assert trial.run([child], steps()) == 0
    assert trial.log().startswith("first stage\nsecond stage\n")
    assert (trial.state().state, trial.state().pid) == ("stopped", None)


@pytest.mark.parametrize(
    ("reply", "is_ready"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False),
        (b"220 mail.example.org ESMTP\r\n", False),  # something else listens there
        (b"", False),
    ],
)
def test_what_counts_as_ready(reply: bytes, is_ready: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        assert supervisor_module._answers(f"http://127.0.0.1:{listener.getsockname()[1]}/health") is is_ready
        thread.join()


def test_probes_keep_their_distance_while_the_child_writes(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_at: list[float] = []
    monkeypatch.setattr(supervisor_module, "_answers", lambda url: asked_at.append(time.monotonic()))
    chatty = trial.child("a", shell("while :; do echo x; done"))
    trial.run([chatty], wait(lambda: len(asked_at) >= 3))
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(asked_at))


def test_given_up_after_three_failed_starts(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    child = trial.child("a", shell("echo; echo why it fails >&2; exit 3"), ready_url="http://127.0.0.1:9/")
    assert trial.run([child]) == 1
    assert trial.supervisor.gave_up
    assert (trial.state().state, trial.state().restarts, trial.state().pid) == ("failed", 2, None)
    assert trial.state().message == "exited with code 3 after 0 s"
    assert trial.log().count("why it fails") == 3
    reports = capsys.readouterr().err
    assert "starts again in 0.02 s" in reports
    assert "starts again in 0.04 s" in reports
    assert "a exited with code 3 after 0 s and is not started again. Its last lines:\n    why it fails\n" in reports
    assert f"all of it: {trial.folder}/a.log" in reports


def test_one_that_is_given_up_takes_the_others_along(trial: Trial) -> None:
    good = trial.child("good", shell("exec sleep 1000"))
    bad = trial.child("bad", shell("exit 2"), ready_url="http://127.0.0.1:9/", final_codes=(1, 2))
    assert trial.run([good, bad]) == 1
    assert trial.state("bad").state == "failed"
    assert trial.state("bad").restarts == 0
    assert (trial.state("good").state, trial.state("good").pid) == ("stopped", None)


def killed_again_and_again(trial: Trial, times: int) -> Steps:
    for number in range(times):
        yield from wait(lambda: trial.state().state == "ready")
        trial.kill()
        yield from wait(lambda number=number: trial.state().restarts == number + 1)  # type: ignore[misc]
        assert trial.state().message.startswith("was killed by SIGKILL after ")
    yield from wait(lambda: trial.state().state == "ready")
    assert trial.state().message == ""


def test_what_was_ready_once_is_never_given_up(
    trial: Trial, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_LAST_BACKOFF_S", 0.05)
    child = trial.child("a", shell("exec sleep 1000"))
    assert trial.run([child], killed_again_and_again(trial, 4), max_failed_starts=1) == 0
    reports = capsys.readouterr().err
    backoffs = [word for word in reports.split() if word.startswith("0.0")]
    assert backoffs == ["0.02", "0.04", "0.05", "0.05"]


def test_the_backoff_begins_anew_after_a_steady_run(
    trial: Trial, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_STEADY_S", 0.0)
    child = trial.child("a", shell("exec sleep 1000"))
    trial.run([child], killed_again_and_again(trial, 3))
    assert capsys.readouterr().err.count("starts again in 0.02 s") == 3


def test_the_backoff_does_not_overflow(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_LAST_BACKOFF_S", 0.01)

    def steps() -> Steps:
        yield from wait(lambda: trial.state().state == "ready")
        trial.supervisor._supervised[0].num_short_runs = 5000
        yield from killed_again_and_again(trial, 1)

    assert trial.run([trial.child("a", shell("exec sleep 1000"))], steps()) == 0


def test_a_start_that_fails_is_tried_again(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = iter([OSError(errno.EAGAIN, "no more processes"), OSError(errno.EMFILE, "no more files"), None])

    def start(output: int) -> int:
        if error := next(attempts):
            raise error
        return shell("exec sleep 1000")(output)

    assert trial.run([trial.child("a", start)], wait(lambda: trial.state().state == "ready")) == 0
    assert trial.state().restarts == 2
    assert "a could not be started ([Errno 11] no more processes); it starts again" in capsys.readouterr().err


def test_sigkill_for_what_ignores_sigterm(trial: Trial) -> None:
    deaf = trial.child("deaf", python(IGNORES_SIGTERM), stop_timeout_s=0.3)
    good = trial.child("good", shell("exec sleep 1000"))

    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log("deaf"))
        yield from wait(lambda: trial.state("good").state == "ready")

    started = time.monotonic()
    assert trial.run([deaf, good], steps()) == 0
    assert 0.3 < time.monotonic() - started < 10  # not the 15 s of the other child


def test_output_never_blocks_a_child(trial: Trial) -> None:
    flood = trial.child("a", shell(f"head -c 8388608 /dev/zero; touch {trial.folder}/done; exec sleep 1000"))
    trial.run([flood], wait((trial.folder / "done").exists))
    assert (trial.folder / "a.log").stat().st_size == 8 << 20


def test_output_does_not_block_children_that_stop(trial: Trial) -> None:
    children = [trial.child(name, python(FLOODS_ON_SIGTERM)) for name in ("a", "b", "c")]
    trial.run(children, wait(lambda: all("up" in trial.log(name) for name in "abc")))
    assert [(trial.folder / f"{name}.log").stat().st_size for name in "abc"] == [3 + (1 << 20)] * 3


def test_a_child_that_closes_its_output(trial: Trial) -> None:
    """The descriptor's number is free then, and another child's output gets it: it must stay that one's."""
    closed = trial.child(
        "closed", shell(f"while [ ! -e {trial.folder}/close ]; do sleep 0.05; done; exec >&- 2>&-; exec sleep 1000")
    )
    script = f"echo begun; while [ ! -e {trial.folder}/go ]; do sleep 0.05; done; echo gone; exec sleep 1000"
    other = trial.child("other", shell(script))

    def steps() -> Steps:
        running = trial.supervisor._supervised[0].running
        assert running is not None
        number = running.output
        (trial.folder / "close").touch()
        yield from wait(lambda: running.output is None)
        yield from wait(lambda: trial.state("other").state == "ready")
        trial.kill("other")
        yield from wait(lambda: trial.log("other").count("begun") == 2)
        reborn = trial.supervisor._supervised[1].running
        assert reborn is not None
        assert number in (reborn.output, reborn.pidfd)
        trial.kill("closed")
        yield from wait(lambda: trial.state("closed").restarts == 1)
        (trial.folder / "go").touch()
        yield from wait(lambda: "gone" in trial.log("other"))
        assert trial.state("other").restarts == 1

    assert trial.run([closed, other], steps()) == 0


def test_a_grandchild_that_keeps_the_pipe_open(trial: Trial) -> None:
    child = trial.child("a", shell("sleep 1000 & echo $!; exit 3"), final_codes=(3,))
    assert trial.run([child]) == 1
    grandchild = psutil.Process(int(trial.log()))
    grandchild.kill()
    grandchild.wait(TIMEOUT_S)
    assert trial.state().message == "exited with code 3 after 0 s"


def test_the_last_words_reach_the_log(trial: Trial) -> None:
    """Even if the child ended before it was watched, so that its end is seen first."""

    def start(output: int) -> int:
        pid = shell("head -c 65000 /dev/zero; echo last words; exit 3")(output)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    assert trial.run([trial.child("a", start, final_codes=(3,))]) == 1
    assert trial.log().endswith("last words\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stops_by_signal_even_while_it_starts(trial: Trial, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)

    def start(output: int) -> int:
        os.kill(os.getpid(), number)
        return shell("exec sleep 1000")(output)

    try:
        assert trial.run([trial.child("a", start), trial.child("b", shell("exec sleep 1000"))], iter(int, 1)) == 0
    finally:
        signal.signal(number, before)
    assert {state.state for state in trial.states.values()} == {"stopped"}


def test_nohup(trial: Trial) -> None:
    def steps() -> Steps:
        yield from wait(lambda: trial.state().state == "ready")
        os.kill(os.getpid(), signal.SIGHUP)
        yield
        trial.kill()
        yield from wait(lambda: trial.state().restarts == 1)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert trial.run([trial.child("a", shell("exec sleep 1000"))], steps()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trial.state().restarts == 1


def test_a_full_disk(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the log, nor the state, nor the report can be written; the child is restarted all the same."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    (trial.folder / "file").touch()
    trial.run_folder = RunFolder(trial.folder / "file" / "run")

    def steps() -> Steps:
        yield
        child = trial.supervisor._supervised[0]
        yield from wait(lambda: child.state.state == "ready" and child.log.num_dropped_bytes >= 3)
        assert child.state.pid is not None
        os.kill(child.state.pid, signal.SIGKILL)
        yield from wait(lambda: child.state.restarts == 1 and child.state.state == "ready")

    child = trial.child("a", shell("echo up; exec sleep 1000"), log_file=Path("/dev/full"))
    assert trial.run([child], steps()) == 0


def test_on_tick_until_it_returns_false(trial: Trial) -> None:
    ticks = []

    def tick() -> bool:
        ticks.append(time.monotonic())
        return len(ticks) < 3

    child = trial.child("a", shell("sleep 0.5; exit 5"), final_codes=(5,))
    assert Supervisor([child], trial.run_folder, on_tick=tick).run() == 1
    assert len(ticks) == 3


def test_children_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    supervising = subprocess.Popen([sys.executable, "-c", SUPERVISES_ONE_CHILD, str(log), str(tmp_path / "run")])
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = psutil.Process(int(log.read_text()))
    supervising.kill()
    supervising.wait()
    child.wait(TIMEOUT_S)
