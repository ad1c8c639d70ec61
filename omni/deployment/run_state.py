"""What is running: a folder for each deployment, a small JSON file for each of its processes.

Supervisors write, the command line reads. Files are replaced whole; a reader never sees half of one. A file that cannot
be read, of another version or of a machine that crashed, counts as none.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from omni.process import start_ticks

T = TypeVar("T")

State = Literal["starting", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """One process as its supervisor sees it."""

    name: str
    state: State = "starting"
    pid: int | None = None
    stage: str = ""  # while starting: what it is doing
    progress: float = 0.0  # while starting: 0 to 1
    since_unix_s: float = 0.0  # when `state` began
    restarts: int = 0
    message: str = ""  # why it failed or restarts
    host: str = ""  # where it runs; "": here

    def changed(self, **changes: object) -> "ProcessState":
        if changes.get("state", self.state) != self.state:
            changes["since_unix_s"] = time.time()
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DeploymentState:
    """One deployment that was started: who runs it, and from what."""

    name: str
    config_file: str
    log_folder: str
    proxy_url: str
    served_model_name: str
    process_names: tuple[str, ...]
    launcher_pid: int  # 0 where the backend is not local
    launcher_start_ticks: int | None  # tells the launcher from a later process with its pid
    backend: str = "local"

    @property
    def is_running(self) -> bool:
        """As far as this machine knows: what a remote backend has started runs until it is stopped."""
        if self.backend != "local":
            return True
        return start_ticks(self.launcher_pid) == self.launcher_start_ticks is not None


class RunFolder:
    """The state files of one deployment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, deployment_name: str) -> "RunFolder":
        return cls(state_folder() / deployment_name)

    def make(self) -> None:
        """It has environments and addresses in it, which are this user's own."""
        for folder in (self.path.parent, self.path):
            folder.mkdir(0o700, parents=True, exist_ok=True)

    def write_deployment(self, state: DeploymentState) -> None:
        self._write("deployment.json", state)

    def deployment(self) -> DeploymentState | None:
        return self._read("deployment.json", DeploymentState)

    def write(self, state: ProcessState) -> None:
        self._write(f"{state.name}.process.json", state)

    def processes(self) -> dict[str, ProcessState]:
        try:
            names = sorted(os.listdir(self.path))
        except FileNotFoundError:
            return {}
        states = (self._read(name, ProcessState) for name in names if name.endswith(".process.json"))
        return {state.name: state for state in states if state is not None}

    def remove_process(self, name: str) -> None:
        (self.path / f"{name}.process.json").unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, state: DeploymentState | ProcessState) -> None:
        self.make()
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_bytes(msgspec.json.encode(state))
        temporary.replace(self.path / name)

    def _read(self, name: str, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None


def state_folder() -> Path:
    """`$OMNI_STATE_DIR`, else `$XDG_STATE_HOME/omni`, else `~/.local/state/omni`."""
    if chosen := os.environ.get("OMNI_STATE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "omni"


def running_deployments() -> Iterator[DeploymentState]:
    """Deployments whose launcher is alive, or that were started elsewhere from here."""
    folder = state_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        state = RunFolder(path).deployment()
        if state is not None and state.is_running:
            yield state


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """For looking whether a deployment runs and taking its place: no other process does so meanwhile."""
    state_folder().mkdir(0o700, parents=True, exist_ok=True)
    with (state_folder() / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
