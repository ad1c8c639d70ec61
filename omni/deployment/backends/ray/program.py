"""Keeps one program running inside an actor, without being the process's main thread as `omni.supervisor` must be."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omni.process import parent_environment
from omni.rotating_log import RotatingLog

_FIRST_BACKOFF_S: Final = 0.5
_LAST_BACKOFF_S: Final = 60.0
_STEADY_S: Final = 60.0  # a program that ran for so long starts its backoff anew
_FINAL_CODES: Final = (2,)  # it cannot run as written: starting it again is of no use
_KILL_S: Final = 10.0

# Ray gives these to its workers. They are about the worker itself (its cores for numpy, its debugger, its job), or say
# which devices it has: the engines' deployment file says so too, and vLLM's ray executor must see them all.
_RAY_OWN: Final = (
    "OMP_NUM_THREADS",
    "PYTHONBREAKPOINT",
    "RAY_JOB_ID",
    "RAY_RAYLET_PID",
    "RAY_CLIENT_MODE",
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Start:
    """How to start it this time."""

    command: Sequence[str]
    env: Mapping[str, str]  # on top of this process's
    cores: tuple[int, ...] = ()  # empty: any


class Program:
    """Args:
    prepare: called before each start, in the thread that supervises; what it raises counts as a failed start.
    log_file: of stdout and stderr.
    """

    def __init__(self, prepare: Callable[[], Start], log_file: Path) -> None:
        self._prepare = prepare
        self._log = RotatingLog(log_file)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = threading.Event()
        self._is_restarting = False
        self._wake = threading.Event()  # ends a wait between two starts
        # The program dies with the thread that has started it, so that one lives as long as this process.
        self._thread = threading.Thread(target=self._supervise, name="program", daemon=True)
        self.num_restarts = 0
        self.num_failures = 0  # in a row: it ended by itself and not well
        self.message = ""
        self.has_failed = False

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        self._thread.start()

    def restart(self, stop_timeout_s: float) -> None:
        """End it by SIGTERM, else SIGKILL; it starts again at once."""
        self._is_restarting = True
        self._wake.set()
        if not self._thread.is_alive() and not self._is_stopping.is_set():  # it had failed for good
            self.has_failed = False
            self._thread = threading.Thread(target=self._supervise, name="program", daemon=True)
            self._thread.start()
        else:
            self._end(stop_timeout_s)

    def stop(self, stop_timeout_s: float) -> None:
        """End it by SIGTERM, else SIGKILL. Twice does no harm."""
        self._is_stopping.set()
        self._wake.set()
        self._end(stop_timeout_s)
        self._thread.join(_KILL_S)
        self._log.close()

    def _end(self, stop_timeout_s: float) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()

    def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._is_stopping.is_set():
            began_s = time.monotonic()
            self._is_restarting = False
            self._wake.clear()
            code = self._run()
            if self._is_stopping.is_set():
                return
            if code in _FINAL_CODES:
                self.has_failed = True
                return
            self.num_restarts += 1
            if self._is_restarting:
                continue
            if time.monotonic() - began_s > _STEADY_S:
                backoff_s, self.num_failures = _FIRST_BACKOFF_S, 0
            self.num_failures += code is not None and code != 0
            self._wake.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    def _run(self) -> int | None:
        """One life of the program; its exit code, None if it could not be started."""
        try:
            start = self._prepare()
            if start.cores:
                os.sched_setaffinity(0, start.cores)  # of this thread, and so of what it starts
            environment = {name: value for name, value in os.environ.items() if name not in _RAY_OWN}
            self._process = process = subprocess.Popen(
                list(start.command),
                env={**environment, **start.env, **parent_environment()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except Exception as error:  # of Ray, of the system: said, and tried again
            self.message = f"cannot start: {error}"
            return None
        if self._is_stopping.is_set():  # meanwhile
            process.terminate()
        self.message = ""
        pump = threading.Thread(target=self._pump, args=(process,), name="log", daemon=True)
        pump.start()
        code = process.wait()
        pump.join(1.0)  # longer only if something that it has started outlives it
        self.message = f"ended with code {code}" if code >= 0 else f"killed by signal {-code}"
        return code

    def _pump(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            while data := os.read(output.fileno(), 1 << 16):
                with contextlib.suppress(ValueError):  # closed: something that the program has started outlives it
                    self._log.write(data)
