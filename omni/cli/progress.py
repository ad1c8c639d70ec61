"""A progress bar for each process of a deployment that starts."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from omni.deployment.run_state import ProcessState, RunFolder

_BEFORE_FORK = ProcessState(name="", stage="importing vLLM", progress=0.05)


class StartProgress:
    """Draws the states in a run folder. On something that is no terminal, a line for each process that gets ready."""

    def __init__(self, folder: RunFolder, process_names: tuple[str, ...], console: Console) -> None:
        self._folder = folder
        self._names = process_names
        self._console = console
        self._started = time.monotonic()
        self._ready: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[stage]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        self._tasks = {name: self._progress.add_task(name, total=1.0, stage="") for name in self._names}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bars as they are."""
        self._progress.stop()

    def update(self) -> bool:
        """Draw the present states; returns whether any process is not ready yet."""
        states = self._folder.processes()
        for name in self._names:
            state = states.get(name, _BEFORE_FORK)
            stage = state.stage if state.state in ("starting", "ready") else f"{state.state}: {state.message}"
            self._progress.update(self._tasks[name], completed=state.progress, stage=stage)
            if state.state == "ready" and name not in self._ready:
                self._ready.add(name)
                if not self._console.is_terminal:
                    self._console.print(f"{name} ready after {time.monotonic() - self._started:.1f} s", markup=False)
        self._progress.refresh()
        return len(self._ready) < len(self._names)
