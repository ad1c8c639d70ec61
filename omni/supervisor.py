"""Keeps a set of processes running: start, watch, log, restart with backoff, stop without a trace.

One thread and no asyncio, so that children may be forked at any time. The loop sleeps until a child writes, a child
ends, a signal comes or a timer is due.
"""

import contextlib
import math
import os
import selectors
import signal
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from omni.deployment.restart_request import take_restart
from omni.deployment.run_state import ProcessState, RunFolder
from omni.process import remove_traces
from omni.rotating_log import RotatingLog

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # unless ignored, as under nohup
_PROBE_INTERVAL_S = 0.2
_TICK_S = 0.1
_FIRST_BACKOFF_S = 0.5
_LAST_BACKOFF_S = 60.0
_STEADY_S = 60.0  # a child that was ready for so long starts its backoff anew
_MAX_DOUBLINGS = 16  # more would change nothing, and 2.0**1024 is no float
_LAST_LINES = 12
_LINE_BYTES = 500  # of each of them

# Children listen on this machine: a proxy named by $http_proxy must not be asked for them.
# Nothing is told them, so whom a certificate names does not matter.
_unverified = ssl.create_default_context()
_unverified.check_hostname, _unverified.verify_mode = False, ssl.CERT_NONE
_opener = build_opener(ProxyHandler({}), HTTPSHandler(context=_unverified))


@dataclass(frozen=True, kw_only=True)
class Child:
    """What to supervise.

    Attributes:
        start: starts the process with this descriptor as its stdout and stderr; returns its pid.
        ready_url: answers 200 once the process is ready; None: it is ready when it runs.
        stages: what the log says → how far the start has come (0 to 1) and what is being done.
        stop_timeout_s: between SIGTERM and SIGKILL.
        final_codes: exit codes after which starting it again is of no use.
        is_optional: the others go on when it is given up.
    """

    name: str
    start: Callable[[int], int]
    log_file: Path
    ready_url: str | None = None
    stages: tuple[tuple[bytes, float, str], ...] = ()
    stop_timeout_s: float = 15.0
    final_codes: tuple[int, ...] = ()
    is_optional: bool = False


@dataclass
class _Running:
    """A child's present process."""

    pid: int
    pidfd: int
    output: int | None  # where its stdout and stderr are read; None once all its writers have closed it
    started: float
    probe_at: float
    ready_since: float | None = None
    kill_at: float | None = None  # set once it was told to stop
    last_lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))


class _Supervised:
    """A child, its log, its state and, unless it waits for a restart, its process."""

    def __init__(self, child: Child, folder: RunFolder) -> None:
        self.child = child
        self.log = RotatingLog(child.log_file)
        self.running: _Running | None = None
        self.restart_at: float | None = None
        self.num_short_runs = 0  # in a row
        self.was_ever_ready = False
        self.is_leaving = False  # told to stop while the others go on
        self.is_restarting = False  # told to stop, to be started at once
        self._folder = folder
        self.state = ProcessState(name=child.name, since_unix_s=time.time())

    def set_state(self, **changes: object) -> None:
        state = self.state.changed(**changes)
        if state != self.state:
            self.state = state
            with contextlib.suppress(OSError):  # a full disk hides the state, it does not stop the process
                self._folder.write(state)

    def forget(self) -> None:
        self.log.close()
        self.take_restart()
        with contextlib.suppress(OSError):
            self._folder.remove_process(self.child.name)

    def take_restart(self) -> bool:
        """Whether somebody has asked for it; see `omni.deployment.restart_request`."""
        return take_restart(self._folder, self.child.name)


class Supervisor:
    """Args:
    children: what to run; all are started at once, stopped in reverse order.
    folder: where their states are written.
    max_failed_starts: a child that ends so often before it was ever ready is given up, and all with it. One that was
        ready once is started again for as long as it takes: the others keep serving.
    on_tick: called some times a second until it returns False.
    on_request: called after each SIGUSR1, from the loop; it may `add` children and `stop` some.

    SIGUSR1 also restarts the children for which that was asked in the folder.
    """

    def __init__(
        self,
        children: Iterable[Child],
        folder: RunFolder,
        *,
        max_failed_starts: int = 3,
        on_tick: Callable[[], bool] | None = None,
        on_request: Callable[["Supervisor"], None] | None = None,
    ) -> None:
        self._folder = folder
        self._supervised = [_Supervised(child, folder) for child in children]
        self._max_failed_starts = max_failed_starts
        self._on_tick = on_tick
        self._on_request = on_request
        self._is_requested = False
        self._selector = selectors.DefaultSelector()
        self._stop_signal: int | None = None
        self.gave_up = False

    def run(self) -> int:
        """Run until one of STOP_SIGNALS comes or a child is given up; returns the exit code (0 or 1)."""
        wake_reader, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(wake_reader, selectors.EVENT_READ, None)
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        handled.append(signal.SIGUSR1)
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        previous_fd = signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        try:
            for supervised in self._supervised:
                self._start(supervised)
            while self._stop_signal is None and not self.gave_up:
                self._wait_and_handle(self._seconds_to_timer())
                self._run_timers()
                if self._is_requested:
                    self._is_requested = False
                    self._do_what_is_asked()
        finally:
            self._stop_all()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(wake_reader)
            os.close(wake_writer)
        return 1 if self.gave_up else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the children that are to run."""
        return tuple(s.child.name for s in self._supervised if not s.is_leaving)

    def add(self, child: Child) -> None:
        """Start one more."""
        supervised = _Supervised(child, self._folder)
        self._supervised.append(supervised)
        self._start(supervised)

    def stop(self, name: str) -> None:
        """Stop one for good; its state goes when it has ended."""
        supervised = next(s for s in self._supervised if s.child.name == name and not s.is_leaving)
        supervised.is_leaving = True
        supervised.restart_at = None
        if supervised.running is None:
            self._drop(supervised)
        else:
            _tell_to_stop(supervised.running, supervised.child)

    def restart(self, name: str) -> None:
        """Start one again at once: after it has stopped, if it runs; also one that waits or was given up."""
        supervised = next(s for s in self._supervised if s.child.name == name and not s.is_leaving)
        if supervised.is_restarting:
            return
        num_restarts = supervised.state.restarts + 1
        supervised.set_state(state="restarting", message="restarts on request", restarts=num_restarts)
        if supervised.running is None:
            self._start_afresh(supervised)
        else:
            supervised.is_restarting = True
            _tell_to_stop(supervised.running, supervised.child)

    def _do_what_is_asked(self) -> None:
        if self._on_request is not None:
            self._on_request(self)
        for supervised in self._supervised:
            if not supervised.is_leaving and supervised.take_restart():
                self.restart(supervised.child.name)

    def _drop(self, supervised: _Supervised) -> None:
        self._supervised.remove(supervised)
        supervised.forget()

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self._is_requested = True
        else:
            self._stop_signal = number

    # --- start and end of a process

    def _start_afresh(self, supervised: _Supervised) -> None:
        """As if it had never ended by itself."""
        supervised.is_restarting = False
        supervised.num_short_runs = 0
        self._start(supervised)

    def _start(self, supervised: _Supervised) -> None:
        supervised.restart_at = None
        supervised.take_restart()  # what was asked of an earlier process is done herewith
        now = time.monotonic()
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            try:
                os.set_blocking(reader, False)
                pid = supervised.child.start(writer)
            except OSError:
                os.close(reader)
                raise
            finally:
                os.close(writer)
        except OSError as error:  # out of memory, processes or descriptors: that may pass
            self._after_end(supervised, f"could not be started ({error})", (), is_final=False)
            return
        running = _Running(pid=pid, pidfd=os.pidfd_open(pid), output=reader, started=now, probe_at=now)
        supervised.running = running
        self._selector.register(running.pidfd, selectors.EVENT_READ, (self._on_exit, supervised))
        self._selector.register(reader, selectors.EVENT_READ, (self._on_output, supervised))
        supervised.set_state(state="starting", pid=pid, stage="starting", progress=0.0)

    def _on_output(self, supervised: _Supervised) -> None:
        running = supervised.running
        assert running is not None
        assert running.output is not None
        try:
            data = os.read(running.output, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._forget(running.output)
            running.output = None
            return
        supervised.log.write(data)
        running.last_lines.extend(line[:_LINE_BYTES] for line in data.splitlines() if line.strip())
        if supervised.state.state == "starting":
            for text, progress, stage in supervised.child.stages:
                if progress > supervised.state.progress and text in data:
                    supervised.set_state(progress=progress, stage=stage)

    def _on_exit(self, supervised: _Supervised) -> None:
        running = supervised.running
        assert running is not None
        if running.output is not None:  # what it wrote last: a pipe holds no more than one read takes
            self._on_output(supervised)
        code = self._reap(supervised)
        goes_on = self._stop_signal is None and not self.gave_up
        if supervised.is_leaving and goes_on:
            self._drop(supervised)
        elif supervised.is_restarting and goes_on:
            self._start_afresh(supervised)
        if running.kill_at is not None:
            return
        if running.ready_since is not None and time.monotonic() - running.ready_since > _STEADY_S:
            supervised.num_short_runs = 0
        ending = f"{_ending(code)} after {time.monotonic() - running.started:.0f} s"
        self._after_end(supervised, ending, running.last_lines, is_final=code in supervised.child.final_codes)

    def _after_end(self, supervised: _Supervised, ending: str, last_lines: Iterable[bytes], is_final: bool) -> None:
        """Start the child again later, or give it up."""
        supervised.num_short_runs += 1
        never_ready = not supervised.was_ever_ready and supervised.num_short_runs >= self._max_failed_starts
        if never_ready or is_final:
            supervised.set_state(state="failed", pid=None, message=ending)
            self._report(supervised, f"{ending} and is not started again", last_lines)
            self.gave_up = self.gave_up or not supervised.child.is_optional
            return
        doublings = min(supervised.num_short_runs - 1, _MAX_DOUBLINGS)
        backoff_s = min(_FIRST_BACKOFF_S * 2**doublings, _LAST_BACKOFF_S)
        supervised.restart_at = time.monotonic() + backoff_s
        supervised.set_state(state="restarting", pid=None, message=ending, restarts=supervised.state.restarts + 1)
        self._report(supervised, f"{ending}; it starts again in {backoff_s:g} s", last_lines)

    def _reap(self, supervised: _Supervised) -> int:
        """Collect an ended process and what it left; returns its exit code, negative for a signal."""
        running = supervised.running
        assert running is not None
        _, status = os.waitpid(running.pid, 0)
        self._forget(running.pidfd)
        if running.output is not None:
            self._forget(running.output)
        supervised.running = None
        remove_traces(running.pid)
        return os.waitstatus_to_exitcode(status)

    def _forget(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)

    @staticmethod
    def _report(supervised: _Supervised, what: str, last_lines: Iterable[bytes]) -> None:
        lines = b"\n".join(b"    " + line for line in last_lines).decode(errors="replace")
        text = f"{supervised.child.name} {what}. Its last lines:\n{lines}\n  all of it: {supervised.child.log_file}"
        with contextlib.suppress(OSError):  # a full disk or a closed terminal loses the report, not the others
            print(text, file=sys.stderr, flush=True)

    # --- the loop

    def _wait_and_handle(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                os.read(key.fd, 512)
            elif key.fd in self._selector.get_map():  # not ended by an earlier event of this round
                handle, supervised = key.data
                handle(supervised)

    def _seconds_to_timer(self) -> float | None:
        due = [s.restart_at for s in self._supervised if s.restart_at is not None]
        due += [s.running.probe_at for s in self._supervised if s.running and s.state.state == "starting"]
        due += [s.running.kill_at for s in self._supervised if s.running and s.running.kill_at not in (None, math.inf)]
        if self._on_tick is not None:
            due.append(time.monotonic() + _TICK_S)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _run_timers(self) -> None:
        for supervised in self._supervised:
            now = time.monotonic()
            running = supervised.running
            if running is not None and running.kill_at is not None:
                _kill_if_late(running, now)
            elif supervised.restart_at is not None and now >= supervised.restart_at:
                self._start(supervised)
            elif running is not None and supervised.state.state == "starting" and now >= running.probe_at:
                if _answers(supervised.child.ready_url):
                    running.ready_since = time.monotonic()
                    supervised.was_ever_ready = True
                    supervised.set_state(state="ready", progress=1.0, stage="ready", message="")
                running.probe_at = time.monotonic() + _PROBE_INTERVAL_S
        if self._on_tick is not None and not self._on_tick():
            self._on_tick = None

    def _stop_all(self) -> None:
        """SIGTERM to all, the last started first; go on logging while they end; SIGKILL to what does not."""
        for supervised in reversed(self._supervised):
            supervised.is_restarting = False
            if supervised.running is not None:
                _tell_to_stop(supervised.running, supervised.child)
        while stopping := [s.running for s in self._supervised if s.running is not None]:
            now = time.monotonic()
            for running in stopping:
                _kill_if_late(running, now)
            first = min(running.kill_at for running in stopping if running.kill_at is not None)
            self._wait_and_handle(None if first == math.inf else max(0.0, first - now))
        for supervised in self._supervised:
            if supervised.state.state != "failed":
                supervised.set_state(state="stopped", pid=None)
            supervised.log.close()


def _tell_to_stop(running: _Running, child: Child) -> None:
    if running.kill_at is None:
        running.kill_at = time.monotonic() + child.stop_timeout_s
        os.kill(running.pid, signal.SIGTERM)


def _kill_if_late(running: _Running, now: float) -> None:
    if running.kill_at is not None and now >= running.kill_at:
        os.kill(running.pid, signal.SIGKILL)
        running.kill_at = math.inf


def _ending(code: int) -> str:
    return f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _answers(url: str | None) -> bool:
    if url is None:
        return True
    try:
        with _opener.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):  # nothing listens, it says no, or what listens speaks no HTTP
        return False
