"""The parent of `--workers N`: starts the workers, starts again one that dies, and stops them all.

A worker is a fresh process of the same command, not a fork: by the time that one must be replaced the parent has an
event loop and gRPC's threads, whose locks and descriptors a fork would copy in whatever state they are. It costs a
second of one core, at the start and after a crash; meanwhile the others accept from the socket that all share.

Workers die with the parent, even by SIGKILL. Use this in the main thread: the kernel takes the end of the thread that
started a process for the end of its parent.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from services.global_proxy.membership.channel import Channel
from services.global_proxy.membership.errors import ChannelClosedError, WorkerStartError
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.messages import ToRegistry
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.worker_link import WorkerLink
from services.global_proxy.membership.worker_seat import seat_environment

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 10.0
_STEADY_S = 30.0  # a worker that lived as long starts again at once
_KILL_S = 5.0  # for a process to end that must


def backoff_s(num_failures: int) -> float:
    """How long to wait before a worker is started again that has died so many times in a row."""
    return min(_FIRST_BACKOFF_S * 2.0 ** min(num_failures - 1, 16), _MAX_BACKOFF_S)


class Workers:
    """The worker processes, one for each row of the table.

    Args:
        command: of a worker; it calls obey_parent, then WorkerSeat.taken, and ChannelClient.ready when it serves.
        listener: bound and listening; the caller closes it after `stop`.
        start_timeout_s: for all of them to serve.
        shared_fds: what else the workers inherit (WorkerSeat.shared_fds).
    """

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket,
        table: LoadTable,
        registry: Registry,
        start_timeout_s: float = 60.0,
        shared_fds: tuple[int, ...] = (),
    ) -> None:
        self._workers = [
            _Worker(index, command, listener, table, registry, shared_fds) for index in range(table.num_workers)
        ]
        self._start_timeout_s = start_timeout_s

    @property
    def pids(self) -> tuple[int | None, ...]:
        """By index; None: it is not running."""
        return tuple(worker.pid for worker in self._workers)

    async def start(self) -> None:
        """Return when all serve.

        Raises:
            WorkerStartError: one ended first, or they took too long. All have been stopped.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await asyncio.gather(*(worker.start() for worker in self._workers))
        except TimeoutError:
            await self.stop(0.0)
            raise WorkerStartError(f"no service after {self._start_timeout_s:g} s: see the workers' logs") from None
        except BaseException:
            await self.stop(0.0)
            raise

    async def run(self, stopping: asyncio.Event, drain_limit_s: float) -> None:
        """Start them, keep them until `stopping` is set, and stop them. Raises WorkerStartError, as `start` does."""
        starting = asyncio.create_task(self.start())
        told = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await told
        finally:
            for task in (starting, told):
                task.cancel()
            await asyncio.wait({starting, told})
            await self.stop(drain_limit_s)

    async def stop(self, limit_s: float) -> None:
        """SIGTERM to each; SIGKILL to those that are there `limit_s` seconds later."""
        await asyncio.gather(*(worker.stop(limit_s) for worker in self._workers))


class _Worker:
    """One seat, and the processes that have it one after the other."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        listener: socket.socket,
        table: LoadTable,
        registry: Registry,
        shared_fds: tuple[int, ...],
    ) -> None:
        self._index = index
        self._command = command
        self._listener = listener
        self._table = table
        self._registry = registry
        self._shared_fds = shared_fds
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Return when it serves. Raises WorkerStartError: it ended first."""
        serves: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping = asyncio.create_task(self._keep(serves))
        await serves

    async def stop(self, limit_s: float) -> None:
        self._stopping.set()
        if self._keeping is None:
            return
        self._signal(signal.SIGTERM)
        if limit_s > 0:
            await asyncio.wait({self._keeping}, timeout=limit_s)
        if self._process is not None:
            if limit_s > 0:
                logger.warning("worker %d (pid %s) has not ended within %g s: killed", self._index, self.pid, limit_s)
            self._signal(signal.SIGKILL)
        await asyncio.wait({self._keeping}, timeout=_KILL_S)
        self._keeping.cancel()

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def _keep(self, serves: asyncio.Future[None]) -> None:
        """One process after the other, until this is to stop or the first one never served."""
        num_failures = 0
        while not self._stopping.is_set():
            began_s = time.monotonic()
            end = await self._run(serves)
            if not serves.done():
                serves.set_exception(WorkerStartError(f"worker {self._index} {end}: see its log"))
                return
            if self._stopping.is_set():
                return
            num_failures = 1 if time.monotonic() - began_s >= _STEADY_S else num_failures + 1
            wait_s = backoff_s(num_failures)
            logger.error("worker %d %s: starts again in %g s", self._index, end, wait_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()

    async def _run(self, serves: asyncio.Future[None]) -> str:
        """One process from start to end; how it ended. Whatever it was counted for is forgotten then."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process, pid_fd = self._spawn(theirs)
        except OSError as error:  # too many open files, too little memory: this may pass
            ours.close()
            return f"cannot be started ({error})"
        link = WorkerLink(self._registry, await Channel.open(ours, ToRegistry))
        tasks = {asyncio.create_task(self._serve(link)), asyncio.create_task(_tell(link.ready, serves))}
        try:
            await _readable(pid_fd)
        finally:
            os.close(pid_fd)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        status = process.wait()
        self._process = None
        self._table.clear_worker(self._index)
        link.close()
        return f"(pid {process.pid}) ended with status {status}"

    def _spawn(self, channel_end: socket.socket) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and a descriptor that is readable once it has ended. Raises OSError."""
        fds = (self._listener.fileno(), self._table.fd, channel_end.fileno(), *self._shared_fds)
        process = subprocess.Popen(
            self._command,
            env=seat_environment(self._index, *fds),
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is for the parent, which stops them in order
        )
        try:
            pid_fd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        self._process = process
        return process, pid_fd

    async def _serve(self, link: WorkerLink) -> None:
        try:
            await link.run()
        except ChannelClosedError as error:
            logger.error("worker %d: %s", self._index, error)
        # Without its channel it knows of no change any more, so it must end; this is cancelled as it does.
        if not self._stopping.is_set():
            await asyncio.sleep(_KILL_S)
            self._signal(signal.SIGKILL)


async def _tell(ready: asyncio.Event, serves: asyncio.Future[None]) -> None:
    await ready.wait()
    if not serves.done():
        serves.set_result(None)


async def _readable(fd: int) -> None:
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
