"""A contender's two processes, as the benchmark's process sees them."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.kv.cases import Case
from benchmarks.kv.contender import Contender
from benchmarks.kv.side import Reader, Server, Timing, cpu_seconds, run_side

_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0
_context = multiprocessing.get_context("spawn")


class PairError(Exception):
    """The contender failed: what it said."""


class _Process:
    def __init__(self, kind: type[Server] | type[Reader], contender: Contender, cpu: int | None, folder: Path) -> None:
        self.log = folder / f"{contender.name.replace(' ', '-')}-{kind.__name__}.log"
        self.commands, theirs = _context.Pipe()
        arguments = (kind, contender, cpu, self.log, theirs)
        self.process = _context.Process(target=run_side, args=arguments, daemon=True)
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        theirs.close()

    @property
    def pid(self) -> int:
        return cast(int, self.process.pid)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Raises PairError."""
        try:
            self.commands.send((name, arguments))
            if not self.commands.poll(_TIMEOUT_S):
                raise PairError(f"no answer to {name} within {_TIMEOUT_S:.0f} s")
            result, error = self.commands.recv()
        except (EOFError, OSError):
            self.process.join(_END_TIMEOUT_S)
            raise PairError(f"ended with code {self.process.exitcode}{self._last_line()}") from None
        if error is not None:
            raise PairError(error)
        return result

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.commands.send(None)

    def end(self) -> None:
        self.process.join(_END_TIMEOUT_S)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.process.close()
        self.commands.close()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


class Pair:
    """P on one CPU and D on the other. They are stopped but while something is asked of them.

    Args:
        cpus: for P and D; None leaves the choice to the system.
        folder: for what the processes print.
    """

    def __init__(self, contender: Contender, cpus: Sequence[int | None], folder: Path) -> None:
        self.contender = contender
        self._p = _Process(Server, contender, cpus[0], folder)
        self._d = _Process(Reader, contender, cpus[1], folder)

    def start(self, cases: Sequence[Case]) -> None:
        """Connect, and see that the right bytes arrive in each case. Raises PairError."""
        served = self._p.ask("serve")
        self._d.ask("connect", served, self._p.pid)
        self._d.ask("verify", list(cases))
        self._signal(signal.SIGSTOP)

    def time(self, case: Case, max_seconds: float) -> Timing:
        """Raises PairError."""
        with self._awake():
            return cast(Timing, self._d.ask("time", case, max_seconds))

    def idle_cpu(self, seconds: float) -> float:
        """The CPU seconds that both use in a second in which nothing is asked of them."""
        with self._awake():
            start_s, cpu_s = time.monotonic(), self._cpu_seconds()
            time.sleep(seconds)
            return (self._cpu_seconds() - cpu_s) / (time.monotonic() - start_s)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._d.ask_to_end()
        self._d.end()
        self._p.ask_to_end()
        self._p.end()

    def _cpu_seconds(self) -> float:
        return cpu_seconds(self._p.pid) + cpu_seconds(self._d.pid)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in (self._p, self._d):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
