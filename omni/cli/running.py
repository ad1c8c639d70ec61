"""Finding, showing and stopping deployments that run."""

import os
import signal
import time
from pathlib import Path

import psutil

from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder, running_deployments

_STOP_TIMEOUT_S = 45.0


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
    """One state for each process of the plan, in its order; "starting" for those not begun."""
    states = RunFolder.of(deployment.name).processes()
    return [states.get(name, ProcessState(name=name)) for name in deployment.process_names]


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


def log_file(deployment: DeploymentState, name: str) -> Path:
    """Raises DeploymentError when the deployment has no such process."""
    path = Path(deployment.log_folder) / f"{name}.log"
    if not path.exists():
        names = sorted(p.name.removesuffix(".log") for p in Path(deployment.log_folder).glob("*.log"))
        raise DeploymentError(f"{name!r} has no log in {deployment.log_folder}; there are {names}")
    return path


def follow(paths: dict[str, Path], *, num_lines: int, forever: bool) -> None:
    """Print the last lines of each log and, on request, what is added; through rotation."""
    positions: dict[str, tuple[int, int]] = {}
    for name, path in paths.items():
        data = path.read_bytes()
        _print_lines(name if len(paths) > 1 else "", data.splitlines()[-num_lines:])
        positions[name] = (path.stat().st_ino, len(data))
    while forever:
        time.sleep(0.3)
        for name, path in paths.items():
            inode, position = positions[name]
            try:
                now = os.stat(path)
            except FileNotFoundError:  # between two steps of a rotation
                continue
            start = position if now.st_ino == inode else 0
            if now.st_size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read(now.st_size - start)
                _print_lines(name if len(paths) > 1 else "", data.splitlines())
            positions[name] = (now.st_ino, now.st_size)


def _print_lines(name: str, lines: list[bytes]) -> None:
    prefix = f"{name}: " if name else ""
    for line in lines:
        print(prefix + line.decode(errors="replace"), flush=True)
