"""The systems' processes: started in sessions of their own, watched, and gone at the end."""

import os
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from benchmarks.bench_proxy.processes import BenchmarkError, on_cores
from benchmarks.servers import is_healthy
from omni.process import die_with_parent

_STOP_S = 30.0
_POLL_S = 0.2
_TAIL_BYTES = 1500


class Process:
    """A program with its children. What it prints goes to `log_path`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
        self._process = process
        self._log_path = log_path

    def check(self) -> None:
        """Raises BenchmarkError if it has ended."""
        if self._process.poll() is not None:
            tail = self._log_path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
            raise BenchmarkError(f"ended with {self._process.returncode}; the end of {self._log_path}:\n{tail}")

    def family(self) -> list[psutil.Process]:
        """It and all its descendants, those in other sessions too."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """SIGTERM; SIGKILL to whichever of its family is left after a while."""
        family = self.family()
        self._process.terminate()
        if not self._have_ended(family, _STOP_S):
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            self._have_ended(family, _STOP_S)
        self._process.wait(_STOP_S)

    def _have_ended(self, family: Collection[psutil.Process], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while any(map(is_alive, family)):
            if time.monotonic() > deadline:
                return False
            self._process.poll()
            time.sleep(_POLL_S)
        return True


@contextmanager
def running(
    command: Sequence[str | Path], log_path: Path, cores: Collection[int], env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a program on these cores until the block is left.

    Its process group and its temporary folder are its own: vLLM leaves sockets there. It has no session of its own:
    between sessions Linux shares out each core (autogroup), and 6.18 then stalls those that sleep often for up to two
    seconds, which all systems would suffer from. It ends with this process, whatever ends that.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_serving_", ignore_cleanup_errors=True) as temporary:
        with log_path.open("wb") as log, on_cores(cores):
            popen = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, "TMPDIR": temporary, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        process = Process(popen, log_path)
        try:
            yield process
        finally:
            process.stop()


def is_alive(process: psutil.Process) -> bool:
    """Whoever has lost its parent stays a zombie until init looks; that is not alive."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_healthy(urls: Collection[str], processes: Collection[Process], timeout_s: float) -> None:
    """Until all these servers answer /health with 200.

    Raises:
        BenchmarkError: a process has ended, or it takes too long.
    """
    deadline = time.monotonic() + timeout_s
    missing = list(urls)
    while missing := [url for url in missing if not is_healthy(url)]:
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not healthy after {timeout_s:.0f} s: {', '.join(missing)}")
        time.sleep(_POLL_S)


class CpuMeter:
    """CPU seconds of some processes and all their descendants, from /proc, since it was made."""

    def __init__(self, processes: Collection[Process]) -> None:
        self._processes = processes
        self._start_s = time.monotonic()
        self._before = self._read()

    def read(self) -> tuple[float, float]:
        """CPU seconds and seconds. One that ended meanwhile counts no more: none does while all is well."""
        before = self._before
        cpu_s = sum(used_s - before.get(member, 0.0) for member, used_s in self._read().items())
        return cpu_s, time.monotonic() - self._start_s

    def _read(self) -> dict[psutil.Process, float]:
        used_s = {}
        for process in self._processes:
            for member in process.family():
                try:
                    times = member.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                used_s[member] = times.user + times.system
        return used_s
