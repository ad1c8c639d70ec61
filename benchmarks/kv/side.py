"""What runs in the processes P and D of a contender: they do what the benchmark's process asks for, one at a time."""

import contextlib
import ctypes
import os
import signal
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.kv.buffers import new_buffer
from benchmarks.kv.cases import BLOCK_BYTES, Case, spans_of
from benchmarks.kv.contender import Contender

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Timing:
    """Some reads of one case, one after the other."""

    seconds: list[float]
    cpu_p_s: float
    cpu_d_s: float


class Server:
    """Process P."""

    def __init__(self, contender: Contender, undo: contextlib.ExitStack) -> None:
        self.contender = contender
        self.undo = undo
        self.buffer = contender.make_buffer()
        self.buffer.fill()

    def serve(self) -> Any:
        served = self.contender.serve(self.buffer)
        self.undo.callback(self.contender.close)
        return served


class Reader:
    """Process D."""

    def __init__(self, contender: Contender, undo: contextlib.ExitStack) -> None:
        self.contender = contender
        self.undo = undo
        self.buffer = contender.make_buffer()
        self.pid_p = 0
        self.num_reads: dict[Case, int] = {}

    def connect(self, served: Any, pid_p: int) -> None:
        self.pid_p = pid_p
        self.contender.connect(self.buffer, served)
        self.undo.callback(self.contender.close)

    def verify(self, cases: list[Case]) -> None:
        """Raises RuntimeError: bytes that arrived are wrong, or such were written that no span names."""
        source = new_buffer("anonymous")
        source.fill()
        for case in cases:
            spans = spans_of(case, 1)
            self.buffer.bytes[:] = 0
            self.contender.read(spans)
            expected = self.buffer.bytes.copy()
            expected[:] = 0
            for remote, local, size in zip(spans.remote, spans.local, spans.sizes, strict=True):
                expected[local : local + size] = source.bytes[remote : remote + size]
            if not (self.buffer.bytes == expected).all():
                wrong = int((self.buffer.bytes != expected).nonzero()[0][0])
                raise RuntimeError(f"wrong bytes, {case.num_bytes} {case.shape}: first at block {wrong // BLOCK_BYTES}")

    def time(self, case: Case, max_seconds: float) -> Timing:
        """Some reads, fewer if they take too long. The first one, which wakes everything up, does not count."""
        first = self.num_reads.get(case, 0)
        self.num_reads[case] = first + case.num_reads + 1
        reads = [spans_of(case, first + i) for i in range(case.num_reads + 1)]
        read, clock = self.contender.read, time.perf_counter
        read(reads[0])
        seconds = []
        cpu_p_s, cpu_d_s = cpu_seconds(self.pid_p), time.process_time()
        latest = clock() + max_seconds
        for spans in reads[1:]:
            start = clock()
            read(spans)
            end = clock()
            seconds.append(end - start)
            if end > latest:
                break
        return Timing(seconds, cpu_seconds(self.pid_p) - cpu_p_s, time.process_time() - cpu_d_s)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, to the nanosecond: Linux makes a clock of every pid."""
    return time.clock_gettime((~pid << 3) | 2)


def run_side(
    kind: type[Server] | type[Reader], contender: Contender, cpu: int | None, log: Path, commands: Connection
) -> None:
    """The whole process: a command is a method of the side and its arguments; None is the last."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(contender.environment)
    with contextlib.ExitStack() as undo, contextlib.suppress(EOFError):  # that is the end of the benchmark's process
        side = kind(contender, undo)
        while (command := commands.recv()) is not None:
            name, arguments = command
            try:
                commands.send((getattr(side, name)(*arguments), None))
            except Exception as error:
                traceback.print_exc()
                commands.send((None, f"{type(error).__name__}: {error}"))
