"""The processes of the benchmark: built, started on chosen cores, watched, and gone at its end."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

_SOURCES = (Path(__file__).parents[1] / "instant_engine.c", Path(__file__).parent / "http_load.c")
_STOP_S = 5.0
_FIRST_LINE_S = 2.0
_TAIL_BYTES = 600


class BenchmarkError(Exception):
    """Something that the benchmark needs is missing or does not work; the message says what to do."""


def find_program(name: str) -> str | None:
    """Where a program is. Debian keeps servers in /usr/sbin, which an ordinary user's PATH lacks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def build(folder: Path) -> tuple[Path, Path]:
    """Compile the stand-in engine and the load generator into `folder`.

    Raises:
        BenchmarkError: there is no compiler, or it failed.
    """
    compiler = find_program("gcc")
    if compiler is None:
        raise BenchmarkError("gcc is missing, and the stand-in engines are written in C: make system-deps")
    programs = []
    for source in _SOURCES:
        program = folder / source.stem
        done = subprocess.run([compiler, "-O2", "-o", program, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{source.name} does not compile (is libc6-dev installed?):\n{done.stderr}")
        programs.append(program)
    return programs[0], programs[1]


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Processes started in this block run on these cores alone, all of their threads included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """A server with its children; what it prints goes to a file, whose end is shown if it dies.

    Raises:
        BenchmarkError: there is no such program.
    """

    def __init__(self, command: Sequence[str | Path], cores: Collection[int]) -> None:
        self.command = [str(word) for word in command]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        try:
            with on_cores(cores):
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
                )
        except OSError as error:
            self._log.close()
            raise BenchmarkError(f"{self.command[0]} cannot be started: {error}") from error

    def first_line(self) -> str:
        """What it has printed first, within a second or two.

        Raises:
            BenchmarkError: nothing.
        """
        deadline = time.monotonic() + _FIRST_LINE_S
        while time.monotonic() < deadline and self.is_running():
            if b"\n" in (line := os.pread(self._log.fileno(), 100, 0)):
                return line.partition(b"\n")[0].decode()
            time.sleep(0.01)
        raise BenchmarkError(f"{self.command[0]} does not start: {self.log_tail()}")

    def is_running(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        """The end of what it has printed."""
        num_bytes = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL_BYTES, max(num_bytes - _TAIL_BYTES, 0)).decode(errors="replace")

    def cpu_s(self) -> float:
        """CPU seconds used by it and its children so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def rss_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self._tree())

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whichever of them is left."""
        tree = self._tree() if self.is_running() else []
        if tree:
            self._process.terminate()
            psutil.wait_procs(tree, _STOP_S)
            for process in tree:
                if process.is_running():
                    process.kill()
        self._process.wait()
        self._log.close()

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]
