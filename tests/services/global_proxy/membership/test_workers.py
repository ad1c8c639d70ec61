"""Real worker processes: they share one socket, are replaced when they die, and stop when told."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from omni.process import start_ticks
from services.global_proxy.membership.errors import WorkerStartError
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.worker_seat import WorkerSeat
from services.global_proxy.membership.workers import Workers, backoff_s
from tests.services.global_proxy.membership.conftest import soon, spec, until

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
PROGRAM = str(HERE / "worker_program.py")

MakeWorkers = Callable[..., Workers]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture
async def make_workers(listener: socket.socket, table: LoadTable, registry: Registry) -> AsyncIterator[MakeWorkers]:
    made: list[Workers] = []

    def make(manner: str, **options: object) -> Workers:
        command = [sys.executable, PROGRAM, manner]
        made.append(Workers(command, listener, table, registry, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for workers in made:
        await workers.stop(0.0)


async def ask(listener: socket.socket) -> tuple[int, int]:
    """The pid of the worker that answers, and the state's version that it has."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        pid, version = (await reader.read()).split()
        writer.close()
        await writer.wait_closed()
    return int(pid), int(version)


async def test_a_killed_worker_is_forgotten_and_replaced_while_the_other_serves(
    make_workers: MakeWorkers, listener: socket.socket, table: LoadTable, registry: Registry
) -> None:
    workers = make_workers("serve")
    await workers.start()
    first, second = workers.pids
    assert first is not None
    assert (table.requests(0), table.tokens(0)) == (2, 3)
    os.kill(first, signal.SIGKILL)
    await until(lambda: workers.pids[0] is None)
    assert (table.requests(0), table.tokens(0)) == (1, 2)
    assert (await ask(listener))[0] == second

    registry.add(spec(1), "file")
    await until(lambda: workers.pids[0] is not None and table.requests(0) == 2)
    assert workers.pids[0] != first
    await until(lambda: registry.applied_version == registry.state.version)
    pid, version = await ask(listener)
    assert pid in workers.pids
    assert version == registry.state.version


async def test_they_stop_when_told(make_workers: MakeWorkers, table: LoadTable) -> None:
    workers = make_workers("serve")
    stopping = asyncio.Event()
    running = asyncio.create_task(workers.run(stopping, 20.0))
    await until(lambda: table.requests(0) == 2)
    pids = workers.pids
    stopping.set()
    await soon(running)
    assert workers.pids == (None, None)
    assert [start_ticks(pid) for pid in pids if pid is not None] == [None, None]
    assert table.requests(0) == 0


async def test_told_to_stop_while_they_start(make_workers: MakeWorkers) -> None:
    workers = make_workers("silent")
    stopping = asyncio.Event()
    running = asyncio.create_task(workers.run(stopping, 20.0))
    await until(lambda: None not in workers.pids)
    stopping.set()
    await soon(running)
    assert workers.pids == (None, None)


async def test_one_that_does_not_stop_is_killed(make_workers: MakeWorkers, table: LoadTable) -> None:
    workers = make_workers("stubborn")
    await workers.start()
    await soon(workers.stop(0.2))
    assert workers.pids == (None, None)
    assert table.requests(0) == 0


async def test_one_that_hears_of_no_change_is_replaced(
    make_workers: MakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.global_proxy.membership.workers._KILL_S", 0.2)
    workers = make_workers("deaf")
    await workers.start()
    before = workers.pids
    await until(lambda: None not in workers.pids and not set(before) & set(workers.pids))


async def test_a_worker_that_cannot_start_ends_the_start(make_workers: MakeWorkers) -> None:
    workers = make_workers("crash")
    with pytest.raises(WorkerStartError, match=r"worker \d \(pid \d+\) ended with status 3: see its log"):
        await workers.start()
    assert workers.pids == (None, None)


async def test_workers_that_never_serve_end_the_start(make_workers: MakeWorkers, table: LoadTable) -> None:
    workers = make_workers("silent", start_timeout_s=0.5)
    with pytest.raises(WorkerStartError, match=r"no service after 0.5 s"):
        await workers.start()
    assert workers.pids == (None, None)


async def test_a_command_that_is_none(listener: socket.socket, table: LoadTable, registry: Registry) -> None:
    workers = Workers(["/nonexistent/program"], listener, table, registry)
    with pytest.raises(WorkerStartError, match=r"cannot be started .*No such file"):
        await workers.start()


def start_parent() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "parent_program.py"), PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


async def test_they_die_with_their_parent() -> None:
    parent = start_parent()
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(start_ticks(pid) is not None for pid in pids)
    parent.kill()
    parent.communicate(timeout=20)
    assert len(pids) == 2
    await until(lambda: all(start_ticks(pid) is None for pid in pids))


def test_waiting_grows_up_to_a_limit() -> None:
    assert [backoff_s(count) for count in (1, 2, 3, 7, 8, 5000)] == [0.1, 0.2, 0.4, 6.4, 10.0, 10.0]


def test_a_process_without_a_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_PROXY_WORKER", raising=False)
    assert WorkerSeat.taken() is None
    monkeypatch.setenv("OMNI_PROXY_WORKER", "0:1000:1001:1002")
    with pytest.raises(ValueError, match="OMNI_PROXY_WORKER='0:1000:1001:1002': only the parent of workers sets it"):
        WorkerSeat.taken()
    assert "OMNI_PROXY_WORKER" not in os.environ
