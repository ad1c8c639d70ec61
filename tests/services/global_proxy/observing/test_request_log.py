"""The log of requests, on real files and pipes."""

import asyncio
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.request_log import RequestLog, RequestRecord


class Timers:
    """The event loop's call_later, under the test's command."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Timers":
        self.due.append((delay_s, callback))
        return self

    def cancel(self) -> None:
        self.due.clear()

    def fire(self) -> None:
        ((_, callback),) = self.due
        self.due.clear()
        callback()


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    timers = Timers()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", timers.call_later)
    return timers


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """[reader, writer]; take out what the test closes itself."""
    ends = list(os.pipe())
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def dropped(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("omni_proxy_log_lines_dropped_total")


def record(number: int = 0, **fields: Any) -> RequestRecord:
    return RequestRecord(f"id{number}", "/v1/completions", **fields)


def lines(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


async def test_a_line_says_everything(tmp_path: Path, metrics: Metrics, timers: Timers) -> None:
    with (tmp_path / "log").open("ab") as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        log.add(record(status=200, client_id='mine"\n', prefill="p:1", ttft_s=0.25, bytes=7))
        log.close()
    (line,) = lines((tmp_path / "log").read_bytes())
    ended = datetime.fromisoformat(line.pop("time"))
    assert abs((datetime.now(UTC) - ended).total_seconds()) < 60
    told = {"id": "id0", "path": "/v1/completions", "status": 200, "client_id": 'mine"\n', "prefill": "p:1"}
    told |= {"ttft_s": 0.25, "bytes": 7, "retries": 0, "continued": 0, "seconds": 0.0, "chunks": 0}
    untold = ("key", "trace_id", "decode", "decode_only", "mixed", "queue_s", "tpot_s", "prompt_tokens", "error")
    assert line == told | dict.fromkeys(untold)


async def test_others_may_write_to_the_same_file(tmp_path: Path, metrics: Metrics, timers: Timers) -> None:
    """As after `2> log`, which does not open for appending."""
    with (tmp_path / "log").open("wb", buffering=0) as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        file.write(b'{"id":"before"}\n')
        log.add(record())
        timers.fire()
        file.write(b'{"id":"after"}\n')
        log.close()
    assert [line["id"] for line in lines((tmp_path / "log").read_bytes())] == ["before", "id0", "after"]


async def test_lines_gather_for_one_write(
    tmp_path: Path, metrics: Metrics, timers: Timers, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        writes.append(write(descriptor, data))
        return writes[-1]

    monkeypatch.setattr(os, "write", counted)
    with (tmp_path / "log").open("ab") as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        assert timers.due == []  # idle: no timer
        for number in range(100):
            log.add(record(number))
        assert [delay_s for delay_s, _ in timers.due] == [0.1]
        assert writes == []
        timers.fire()
        assert len(writes) == 1
        assert [line["id"] for line in lines((tmp_path / "log").read_bytes())] == [f"id{n}" for n in range(100)]
        assert timers.due == []
        log.close()


async def test_a_full_disk_costs_lines_and_nothing_else(metrics: Metrics, timers: Timers) -> None:
    with Path("/dev/full").open("ab") as file:  # noqa: ASYNC230
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        for round_ in range(1, 4):
            log.add(record())
            log.add(record())
            timers.fire()
            assert timers.due == []
            assert dropped(metrics) == 2 * round_
        log.close()


async def test_half_a_line_does_not_spoil_the_next(tmp_path: Path, metrics: Metrics, timers: Timers) -> None:
    path = tmp_path / "log"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("ab") as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        for number in range(3):
            log.add(record(number))
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # the kernel takes a line and a half, then no more
        try:
            timers.fire()
            timers.fire()
            log.add(record(3))
            timers.fire()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert dropped(metrics) == 3  # the one cut in two among them
        log.add(record(4))
        timers.fire()
        log.close()
    first, half, last = path.read_bytes().splitlines()
    assert (json.loads(first)["id"], json.loads(last)["id"]) == ("id0", "id4")
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        json.loads(half)


async def test_a_reader_that_has_gone(pipe: list[int], metrics: Metrics, timers: Timers) -> None:
    log = RequestLog(pipe[1], metrics.log_lines_dropped)
    os.close(pipe.pop(0))
    log.add(record())
    timers.fire()
    assert dropped(metrics) == 1
    log.add(record())
    log.close()
    assert dropped(metrics) == 2


async def test_a_slow_reader_gets_every_line_whole(pipe: list[int], metrics: Metrics, timers: Timers) -> None:
    log = RequestLog(pipe[1], metrics.log_lines_dropped)
    assert os.get_blocking(pipe[1])  # other processes share it
    for number in range(4000):  # more than a pipe holds
        log.add(record(number))
    received = bytearray()
    while timers.due:
        timers.fire()
        while data := _read(pipe[0]):
            received += data
    log.close()
    assert [line["id"] for line in lines(bytes(received))] == [f"id{number}" for number in range(4000)]
    assert dropped(metrics) == 0


async def test_a_stuck_reader_costs_bounded_memory(pipe: list[int], metrics: Metrics, timers: Timers) -> None:
    log = RequestLog(pipe[1], metrics.log_lines_dropped, max_pending_bytes=60_000)
    num_added = 0
    while not dropped(metrics):  # until the pipe and the memory are full
        for _ in range(500):
            log.add(record())
        num_added += 500
        timers.fire()
    assert num_added < 10_000
    received = bytearray()
    while timers.due:
        while data := _read(pipe[0]):
            received += data
        timers.fire()
    log.close()
    received += _read(pipe[0])
    assert len(lines(bytes(received))) == num_added - (dropped(metrics) or 0)


async def test_pipes_are_written_in_pieces_that_stay_whole(
    pipe: list[int], metrics: Metrics, timers: Timers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several workers share a pipe, and the kernel mixes larger writes with theirs."""
    pieces: list[bytes] = []

    def write(descriptor: int, data: bytes) -> int:
        pieces.append(bytes(data))
        return len(data)

    log = RequestLog(pipe[1], metrics.log_lines_dropped)
    for number in range(100):
        log.add(record(number))
    monkeypatch.setattr(os, "write", write)
    timers.fire()
    monkeypatch.undo()
    log.close()
    assert 5 < len(pieces) < 20
    assert all(len(piece) <= 4096 for piece in pieces)
    assert sum(len(lines(piece)) for piece in pieces) == 100


async def test_a_socket_is_a_place_for_lines_too(metrics: Metrics, timers: Timers) -> None:
    """As the journal of systemd gives it for stderr."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        log = RequestLog(writer.fileno(), metrics.log_lines_dropped)
        for number in range(3000):
            log.add(record(number))
        timers.fire()  # would block for ever if it waited for room
        assert len(timers.due) == 1
        assert lines(reader.recv(4096)[:500].rpartition(b"\n")[0] + b"\n")[0]["id"] == "id0"
        log.close()
    assert 0 < (dropped(metrics) or 0) < 3000


async def test_text_that_is_none_costs_its_line(tmp_path: Path, metrics: Metrics, timers: Timers) -> None:
    with (tmp_path / "log").open("ab") as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        log.add(record(1))
        log.add(record(2, client_id="\udcff"))
        log.add(record(3))
        log.close()
    assert [line["id"] for line in lines((tmp_path / "log").read_bytes())] == ["id1", "id3"]
    assert dropped(metrics) == 1


async def test_closing_takes_the_timer_along(tmp_path: Path, metrics: Metrics, timers: Timers) -> None:
    with (tmp_path / "log").open("ab") as file:
        log = RequestLog(file.fileno(), metrics.log_lines_dropped)
        log.add(record())
        log.close()
        assert timers.due == []
        os.fstat(file.fileno())  # is the owner's to close


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return b""
