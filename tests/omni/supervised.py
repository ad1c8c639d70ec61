"""Real processes under a supervisor whose `on_tick` plays the test's part, step by step, in the same thread."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omni.deployment.run_state import ProcessState, RunFolder
from omni.supervisor import Child, Supervisor

TIMEOUT_S = 30
Steps = Iterator[None]


def command(*arguments: str) -> Callable[[int], int]:
    """Starts a program as a `Child` wants it started."""

    def start(output: int) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
        return os.posix_spawn(arguments[0], list(arguments), os.environ, file_actions=actions)

    return start


def shell(script: str) -> Callable[[int], int]:
    return command("/bin/sh", "-c", script)


def python(script: str, *arguments: str) -> Callable[[int], int]:
    return command(sys.executable, "-I", "-c", script, *arguments)


class Trial:
    """A run folder, children and the steps of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = RunFolder(folder / "run")
        self.supervisor: Supervisor

    def child(self, name: str, start: Callable[[int], int], **options: Any) -> Child:
        return Child(name=name, start=start, **{"log_file": self.folder / f"{name}.log", **options})

    def run(self, children: list[Child], steps: Steps | None = None, **options: Any) -> int:
        """Supervise until the steps are done, then SIGTERM; without steps, until the supervisor ends by itself."""
        deadline = time.monotonic() + TIMEOUT_S
        late = False

        def tick() -> bool:
            nonlocal late
            late = time.monotonic() > deadline
            if late or (steps is not None and next(steps, "done") == "done"):
                os.kill(os.getpid(), signal.SIGTERM)
                return False
            return True

        self.supervisor = Supervisor(children, self.run_folder, on_tick=tick, **options)
        code = self.supervisor.run()
        assert not late, f"a step was not over after {TIMEOUT_S} s: {self.states}"
        return code

    @property
    def states(self) -> dict[str, ProcessState]:
        return self.run_folder.processes()

    def state(self, name: str = "a") -> ProcessState:
        return self.states.get(name, ProcessState(name=name, state="stopped"))

    def log(self, name: str = "a") -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str = "a") -> None:
        pid = self.state(name).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


def wait(condition: Callable[[], bool]) -> Steps:
    while not condition():
        yield
