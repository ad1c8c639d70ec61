"""What is running: a folder for each deployment, a small JSON file for each of its processes.

Supervisors write, the command line reads. Files are replaced whole; a reader never sees half of one.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

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
    launcher_pid: int
    launcher_start_unix_s: float  # tells the launcher from a later process with its pid

    @property
    def is_running(self) -> bool:
        try:
            launcher = psutil.Process(self.launcher_pid)
            same = abs(launcher.create_time() - self.launcher_start_unix_s) < 1
            return same and launcher.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunFolder:
    """The state files of one deployment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, deployment_name: str) -> "RunFolder":
        return cls(state_folder() / deployment_name)

    def write_deployment(self, state: DeploymentState) -> None:
        self._write("deployment.json", asdict(state))

    def deployment(self) -> DeploymentState | None:
        content = self._read("deployment.json")
        if content is None:
            return None
        names = content.pop("process_names")
        return DeploymentState(process_names=tuple(names), **content)  # type: ignore[arg-type]

    def write(self, state: ProcessState) -> None:
        self._write(f"{state.name}.process.json", asdict(state))

    def processes(self) -> dict[str, ProcessState]:
        states = {}
        for path in sorted(self.path.glob("*.process.json")):
            content = self._read(path.name)
            if content is not None:
                state = ProcessState(**content)  # type: ignore[arg-type]
                states[state.name] = state
        return states

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, content: dict[str, object]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(content))
        temporary.replace(self.path / name)

    def _read(self, name: str) -> dict[str, object] | None:
        try:
            content: dict[str, object] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        return content


def state_folder() -> Path:
    """`$OMNI_STATE_DIR`, else `$XDG_STATE_HOME/omni`, else `~/.local/state/omni`."""
    if chosen := os.environ.get("OMNI_STATE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "omni"


def running_deployments() -> Iterator[DeploymentState]:
    """Deployments whose launcher is alive."""
    folder = state_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        state = RunFolder(path).deployment()
        if state is not None and state.is_running:
            yield state
