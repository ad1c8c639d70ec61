"""Real programs under a `Program`: started again, stopped, gone with their actor."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from omni.deployment.backends.ray import program as module
from omni.deployment.backends.ray.program import Program, Start

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)",
)
ACTOR = """
import sys, time
from pathlib import Path
from omni.deployment.backends.ray.program import Program, Start
code = "import os, time; from omni.process import obey_parent; obey_parent(); print(os.getpid(), flush=True)"
code += "; time.sleep(1000)"
Program(lambda: Start((sys.executable, "-c", code), {}), Path(sys.argv[1])).start()
time.sleep(1000)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Program]]:
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 0.01)
    programs: list[Program] = []

    def make(*command: str, prepare: Callable[[], Start] | None = None) -> Program:
        program = Program(prepare or (lambda: Start(command, {"OF": "mine"})), tmp_path / "program.log")
        programs.append(program)
        program.start()
        return program

    yield make
    for program in programs:
        program.stop(5)
        assert program.pid is None


def _eventually(condition: Callable[[], object]) -> bool:
    deadline_s = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def _log(folder: Path) -> str:
    return (folder / "program.log").read_text()


def test_a_killed_program_is_started_again(run: Callable[..., Program], tmp_path: Path) -> None:
    program = run(*SLEEP)
    assert _eventually(lambda: "up" in _log(tmp_path))
    pid = program.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert _eventually(lambda: program.pid not in (None, pid))
    assert (program.num_restarts, program.num_failures) == (1, 1)


def test_an_exit_that_says_it_is_of_no_use_is_final(run: Callable[..., Program]) -> None:
    program = run(sys.executable, "-c", "raise SystemExit(2)")
    assert _eventually(lambda: program.has_failed)
    assert program.message == "ended with code 2"
    program.restart(5)
    assert not program.has_failed or _eventually(lambda: program.has_failed), "it was tried once more"


def test_restarted_on_demand_it_waits_for_nothing(run: Callable[..., Program], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 1000.0)
    program = run(*SLEEP)
    assert _eventually(lambda: program.pid)
    pid = program.pid
    program.restart(5)
    assert _eventually(lambda: program.pid not in (None, pid))
    assert program.num_failures == 0


def test_a_wait_between_two_starts_ends_with_a_restart(
    run: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_FIRST_BACKOFF_S", 1000.0)
    flag = tmp_path / "flag"
    code = f"import pathlib, time, sys; time.sleep(1000) if pathlib.Path({str(flag)!r}).exists() else sys.exit(1)"
    program = run(sys.executable, "-c", code)
    assert _eventually(lambda: program.message)
    flag.touch()
    program.restart(5)
    assert _eventually(lambda: program.pid)


def test_what_does_not_hear_sigterm_is_killed(run: Callable[..., Program], tmp_path: Path) -> None:
    program = run(*STUBBORN)
    assert _eventually(lambda: "up" in _log(tmp_path))
    program.stop(0.1)
    assert program.pid is None
    assert program.message == "killed by signal 9"


def test_a_failed_preparation_is_told_and_tried_again(run: Callable[..., Program]) -> None:
    tries = iter([OSError("the master is not there")])

    def prepare() -> Start:
        with suppress(StopIteration):
            raise next(tries)
        return Start(SLEEP, {})

    program = run(prepare=prepare)
    assert _eventually(lambda: program.pid)
    assert program.num_restarts == 1


def test_its_environment(run: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it for a worker with one core
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")  # as for an actor without NPUs of its own
    names = ("OF", "OMP_NUM_THREADS", "ASCEND_RT_VISIBLE_DEVICES")
    code = f"import os, time; print([os.environ.get(name) for name in {names}]"
    run(sys.executable, "-c", code + ", flush=True); time.sleep(1000)")
    assert _eventually(lambda: _log(tmp_path) == "['mine', None, None]\n")


def test_it_computes_on_its_cores_alone(run: Callable[..., Program], tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    code = "import os, time; print(os.sched_getaffinity(0), flush=True); time.sleep(1000)"
    before = os.sched_getaffinity(0)
    run(prepare=lambda: Start((sys.executable, "-c", code), {}, (core,)))
    assert _eventually(lambda: _log(tmp_path) == f"{{{core}}}\n")
    assert os.sched_getaffinity(0) == before


def test_it_ends_with_its_actor_even_by_sigkill(tmp_path: Path) -> None:
    log = tmp_path / "program.log"
    actor = subprocess.Popen([sys.executable, "-c", ACTOR, str(log)])
    try:
        assert _eventually(lambda: log.exists() and log.read_text().strip())
        program = psutil.Process(int(log.read_text()))
    finally:
        actor.kill()
        actor.wait()
    assert not psutil.wait_procs([program], timeout=10)[1]


def test_no_thread_is_left(run: Callable[..., Program]) -> None:
    program = run(*SLEEP)
    assert _eventually(lambda: program.pid)
    program.stop(5)
    assert _eventually(lambda: not [t for t in threading.enumerate() if t.name in ("program", "log")])
