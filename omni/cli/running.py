"""Finding, showing and stopping deployments that run."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import psutil

from omni.deployment.backends import remote_backend
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder, running_deployments
from omni.process import start_ticks

_STOP_TIMEOUT_S = 45.0
_FOLLOW_INTERVAL_S = 0.3


def find(name: str | None) -> DeploymentState:
    """The running deployment of that name, or the only one.

    Raises:
        DeploymentError: there is none, or a name is needed to choose.
    """
    running = {state.name: state for state in running_deployments()}
    if name is not None:
        if name not in running:
            raise DeploymentError(f"no deployment {name!r} is running; running: {sorted(running) or 'none'}")
        return running[name]
    if not running:
        raise DeploymentError("no deployment is running; `omni_cli serve CONFIG` starts one")
    if len(running) > 1:
        raise DeploymentError(f"several deployments are running, name one: {sorted(running)}")
    return next(iter(running.values()))


def process_states(deployment: DeploymentState) -> list[ProcessState]:
    """One state for each process of the plan, in its order; "starting" for those not begun.

    Raises:
        DeploymentError: the hosts of a remote backend cannot be asked.
    """
    if deployment.backend != "local":
        return remote_backend(deployment.backend).process_states(deployment)
    states = RunFolder.of(deployment.name).processes()
    return [_present(states.get(name, ProcessState(name=name))) for name in deployment.process_names]


def _present(state: ProcessState) -> ProcessState:
    """A killed engine host cannot write that its engines ended with it."""
    if state.pid is None or start_ticks(state.pid) is not None:
        return state
    return state.changed(state="restarting", pid=None, message="ended with its supervisor")


def stop(deployment: DeploymentState) -> None:
    """SIGTERM to the launcher, which stops all else; SIGKILL to it and its descendants after 45 s."""
    try:
        launcher = psutil.Process(deployment.launcher_pid)
        descendants = launcher.children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while deployment.is_running and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in [launcher, *descendants] if deployment.is_running else []:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(descendants, timeout=5)


def stop_all(name: str) -> None:
    """Stop the deployment of that name if it runs."""
    for deployment in running_deployments():
        if deployment.name == name:
            stop(deployment)


def log_file(deployment: DeploymentState, name: str) -> Path:
    """Raises DeploymentError when the deployment has no such process."""
    path = Path(deployment.log_folder) / f"{name}.log"
    if not path.exists():
        names = sorted(p.name.removesuffix(".log") for p in Path(deployment.log_folder).glob("*.log"))
        raise DeploymentError(f"{name!r} has no log in {deployment.log_folder}; there are {names}")
    return path


def follow(paths: dict[str, Path], *, num_lines: int, forever: bool) -> None:
    """Print the last lines of each log and, on request, what is added; through rotation."""
    with ExitStack() as stack:
        tails = [_Tail(path, f"{name}: " if len(paths) > 1 else "") for name, path in paths.items()]
        for tail in tails:
            stack.callback(tail.close)
            tail.print_last(num_lines)
            if not forever:
                tail.print_unfinished()
        while forever:
            time.sleep(_FOLLOW_INTERVAL_S)
            for tail in tails:
                tail.print_new()


class _Tail:
    """A log that is read as it grows; held open, so that nothing is missed when it is renamed."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path = path
        self._prefix = prefix
        self._file: BinaryIO = path.open("rb")
        self._unfinished = b""  # a line whose end has not been written yet

    def print_last(self, num_lines: int) -> None:
        *lines, self._unfinished = self._file.read().split(b"\n")
        self._print(lines[-num_lines:] if num_lines else [])

    def print_new(self) -> None:
        newer = self._newer_file()  # looked for before the rest of this one is read: then that rest is whole
        *lines, self._unfinished = (self._unfinished + self._file.read()).split(b"\n")
        self._print(lines)
        if newer is not None:
            self._file.close()
            self._file = newer

    def print_unfinished(self) -> None:
        if self._unfinished:
            self._print([self._unfinished])

    def _newer_file(self) -> BinaryIO | None:
        """The log that took this one's name in a rotation."""
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return None
            return self._path.open("rb")
        except FileNotFoundError:  # between two steps of the rotation
            return None

    def close(self) -> None:
        self._file.close()

    def _print(self, lines: list[bytes]) -> None:
        for line in lines:
            print(self._prefix + line.decode(errors="replace").rstrip("\r\n"), flush=True)
