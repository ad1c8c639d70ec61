"""Keeps a set of processes running: start, watch, log, restart with backoff, stop without a trace.

One thread and no asyncio, so that children may be forked at any time. The loop sleeps until a child writes, a child
ends, a signal comes or a timer is due.
"""

import contextlib
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from omni.deployment.run_state import ProcessState, RunFolder
from omni.process import remove_shared_memory
from omni.rotating_log import RotatingLog

_PROBE_INTERVAL_S = 0.2
_TICK_S = 0.1
_FIRST_BACKOFF_S = 0.5
_LAST_BACKOFF_S = 60.0
_STEADY_S = 60.0  # a child that was ready for so long starts its backoff anew
_LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Child:
    """What to supervise.

    Attributes:
        start: starts the process with this descriptor as its stdout and stderr; returns its pid.
        ready_url: answers 200 once the process is ready; None: it is ready when it runs.
        stages: what the log says → how far the start has come (0 to 1) and what is being done.
        stop_timeout_s: between SIGTERM and SIGKILL.
        final_codes: exit codes after which starting it again is of no use.
    """

    name: str
    start: Callable[[int], int]
    log_file: Path
    ready_url: str | None = None
    stages: tuple[tuple[bytes, float, str], ...] = ()
    stop_timeout_s: float = 15.0
    final_codes: tuple[int, ...] = ()


@dataclass
class _Running:
    """A child's present process."""

    pid: int
    pidfd: int
    output: int
    started: float
    ready_since: float | None = None
    last_lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))


class _Supervised:
    """A child, its log, its state and, unless it waits for a restart, its process."""

    def __init__(self, child: Child, folder: RunFolder) -> None:
        self.child = child
        self.log = RotatingLog(child.log_file)
        self.running: _Running | None = None
        self.restart_at: float | None = None
        self.num_failed_starts = 0
        self._folder = folder
        self.state = ProcessState(name=child.name, since_unix_s=time.time())

    def set_state(self, **changes: object) -> None:
        state = self.state.changed(**changes)
        if state != self.state:
            self.state = state
            with contextlib.suppress(OSError):  # a full disk hides the state, it does not stop the process
                self._folder.write(state)


class Supervisor:
    """Args:
    children: what to run; all are started at once, stopped in reverse order.
    folder: where their states are written.
    max_failed_starts: a child that ends so often in a row before it is ready is given up, and all with it.
    on_tick: called some times a second until it returns False.
    """

    def __init__(
        self,
        children: Iterable[Child],
        folder: RunFolder,
        *,
        max_failed_starts: int = 3,
        on_tick: Callable[[], bool] | None = None,
    ) -> None:
        self._supervised = [_Supervised(child, folder) for child in children]
        self._max_failed_starts = max_failed_starts
        self._on_tick = on_tick
        self._selector = selectors.DefaultSelector()
        self._stop_signal: int | None = None
        self.gave_up = False

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until a child is given up; returns the exit code (0 or 1)."""
        wake_reader, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(wake_reader, selectors.EVENT_READ, None)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        previous_fd = signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        try:
            for supervised in self._supervised:
                self._start(supervised)
            while self._stop_signal is None and not self.gave_up:
                self._wait_and_handle(self._seconds_to_timer())
                self._run_timers()
        finally:
            self._stop_all()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(wake_reader)
            os.close(wake_writer)
        return 1 if self.gave_up else 0

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_signal = number

    # --- start and end of a process

    def _start(self, supervised: _Supervised) -> None:
        supervised.restart_at = None
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        pid = supervised.child.start(writer)
        os.close(writer)
        running = _Running(pid=pid, pidfd=os.pidfd_open(pid), output=reader, started=time.monotonic())
        supervised.running = running
        self._selector.register(running.pidfd, selectors.EVENT_READ, (self._on_exit, supervised))
        self._selector.register(running.output, selectors.EVENT_READ, (self._on_output, supervised))
        supervised.set_state(state="starting", pid=pid, stage="starting", progress=0.0)

    def _on_output(self, supervised: _Supervised) -> None:
        running = supervised.running
        assert running is not None
        try:
            data = os.read(running.output, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._forget(running.output)
            return
        supervised.log.write(data)
        running.last_lines.extend(line for line in data.splitlines() if line.strip())
        if supervised.state.state == "starting":
            for text, progress, stage in supervised.child.stages:
                if progress > supervised.state.progress and text in data:
                    supervised.set_state(progress=progress, stage=stage)

    def _on_exit(self, supervised: _Supervised) -> None:
        running = supervised.running
        assert running is not None
        while running.output in self._selector.get_map():  # what it wrote last
            before = len(running.last_lines)
            self._on_output(supervised)
            if len(running.last_lines) == before or before == _LAST_LINES:
                break
        code = self._reap(supervised)
        was_ready = running.ready_since is not None
        steady = running.ready_since is not None and time.monotonic() - running.ready_since > _STEADY_S
        supervised.num_failed_starts = 0 if was_ready and steady else supervised.num_failed_starts + 1
        message = f"{_ending(code)} after {time.monotonic() - running.started:.0f} s"
        never_ready = not was_ready and supervised.num_failed_starts >= self._max_failed_starts
        if never_ready or code in supervised.child.final_codes:
            supervised.set_state(state="failed", pid=None, message=message)
            self._report(supervised, running, f"{message} and is not started again")
            self.gave_up = True
            return
        backoff_s = min(_FIRST_BACKOFF_S * 2 ** (supervised.num_failed_starts - 1), _LAST_BACKOFF_S)
        supervised.restart_at = time.monotonic() + backoff_s
        supervised.set_state(state="restarting", pid=None, message=message, restarts=supervised.state.restarts + 1)
        self._report(supervised, running, f"{message}; it starts again in {backoff_s:g} s")

    def _reap(self, supervised: _Supervised) -> int:
        """Collect an ended process and what it left; returns its exit code, negative for a signal."""
        running = supervised.running
        assert running is not None
        _, status = os.waitpid(running.pid, 0)
        self._forget(running.pidfd)
        if running.output in self._selector.get_map():
            self._forget(running.output)
        supervised.running = None
        remove_shared_memory(running.pid)
        return os.waitstatus_to_exitcode(status)

    def _forget(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)

    @staticmethod
    def _report(supervised: _Supervised, running: _Running, what: str) -> None:
        lines = b"\n".join(b"    " + line for line in running.last_lines).decode(errors="replace")
        print(f"{supervised.child.name} {what}. Its last lines:\n{lines}\n  all of it: {supervised.child.log_file}",
              file=sys.stderr, flush=True)  # fmt: skip

    # --- the loop

    def _wait_and_handle(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                os.read(key.fd, 512)
            elif key.fd in self._selector.get_map():  # not ended by an earlier event of this round
                handle, supervised = key.data
                handle(supervised)

    def _seconds_to_timer(self) -> float | None:
        if self._on_tick is not None:
            return _TICK_S
        due = [s.restart_at for s in self._supervised if s.restart_at is not None]
        if any(s.state.state == "starting" for s in self._supervised):
            due.append(time.monotonic() + _PROBE_INTERVAL_S)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _run_timers(self) -> None:
        for supervised in self._supervised:
            if supervised.restart_at is not None and time.monotonic() >= supervised.restart_at:
                self._start(supervised)
            elif supervised.state.state == "starting" and _answers(supervised.child.ready_url):
                assert supervised.running is not None
                supervised.running.ready_since = time.monotonic()
                supervised.set_state(state="ready", progress=1.0, stage="ready", message="")
        if self._on_tick is not None and not self._on_tick():
            self._on_tick = None

    def _stop_all(self) -> None:
        """SIGTERM to all, the last started first; wait; SIGKILL to what is left."""
        stopping = [s for s in reversed(self._supervised) if s.running is not None]
        for supervised in stopping:
            assert supervised.running is not None
            os.kill(supervised.running.pid, signal.SIGTERM)
        deadline = time.monotonic() + max((s.child.stop_timeout_s for s in stopping), default=0)
        for supervised in stopping:
            self._await_end(supervised, deadline)
        for supervised in self._supervised:
            if supervised.state.state != "failed":
                supervised.set_state(state="stopped", pid=None)
            supervised.log.close()

    def _await_end(self, supervised: _Supervised, deadline: float) -> None:
        running = supervised.running
        assert running is not None
        ended = selectors.DefaultSelector()
        ended.register(running.pidfd, selectors.EVENT_READ)
        if running.output in self._selector.get_map():
            ended.register(running.output, selectors.EVENT_READ)
        killed = False
        while True:
            ready = {key.fd for key, _ in ended.select(max(0.0, deadline - time.monotonic()))}
            if running.output in ready:
                self._on_output(supervised)
                if running.output not in self._selector.get_map():
                    ended.unregister(running.output)
            if running.pidfd in ready:
                break
            if not killed and time.monotonic() >= deadline:
                os.kill(running.pid, signal.SIGKILL)
                killed = True
                deadline = time.monotonic() + 10  # a killed process ends; this only bounds the wait for its output
        ended.close()
        self._reap(supervised)


def _ending(code: int) -> str:
    return f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _answers(url: str | None) -> bool:
    if url is None:
        return True
    try:
        with urlopen(url, timeout=1) as response:  # noqa: S310 (our own child's address)
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
