"""Accepting: fairly, with TLS, without file descriptors, and without a place for logs."""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import uvloop

from services.global_proxy.http import listener as module
from services.global_proxy.http.client_connection import ClientConnection, ConnectionLimits
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.listener import Listener
from services.global_proxy.http.reply import Reply
from services.global_proxy.security.tls import server_context
from tests.services.global_proxy.conftest import until
from tests.services.global_proxy.security.test_tls import write_pair
from tests.standins.engine import StandinEngine

LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


class CountedSocket(socket.socket):
    """Knows how often it was asked, and can be told to be out of descriptors."""

    num_asked = 0
    error: int | None = None

    def accept(self) -> tuple[socket.socket, object]:
        self.num_asked += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@pytest.fixture
def sock() -> Iterator[CountedSocket]:
    with CountedSocket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen(64)
        yield made


def num_pauses(caplog: pytest.LogCaptureFixture) -> int:
    return sum("accepting no connections" in record.message for record in caplog.records)


async def serve(request: ClientRequest, reply: Reply) -> None:
    reply.whole(200, b"text/plain", b"ok")


def make_connection() -> ClientConnection:
    return ClientConnection(serve, ConnectionLimits(), set())


@pytest.fixture
async def listeners() -> AsyncIterator[list[Listener]]:
    made: list[Listener] = []
    yield made
    for listener in made:
        listener.close()


async def ask(sock: socket.socket, tls: ssl.SSLContext | None = None) -> asyncio.StreamWriter:
    """A client that has been answered, and stays."""
    host = None if tls is None else "localhost"
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*sock.getsockname(), ssl=tls, server_hostname=host)
        writer.write(LIVE)
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 ")
    return writer


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EPERM])
async def test_no_room(
    sock: CountedSocket,
    listeners: list[Listener],
    error: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is asked now and then rather than again and again, and the newcomer is still there afterwards."""
    monkeypatch.setattr(module, "_PAUSE_S", 0.1)
    listener = Listener(sock, make_connection)
    listeners.append(listener)
    sock.error = error
    asking = asyncio.create_task(ask(sock))
    await until(lambda: num_pauses(caplog) == 3)
    assert sock.num_asked == 3
    sock.error = None
    (await asking).close()
    await until(lambda: listener.num_connections == 0)


async def test_clients_get_half_of_the_descriptors(
    sock: CountedSocket, listeners: list[Listener], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.05)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6, 6))
    listener = Listener(sock, make_connection)
    listeners.append(listener)
    writers = [await ask(sock) for _ in range(3)]
    fourth = asyncio.create_task(ask(sock))
    await until(lambda: num_pauses(caplog) > 1)
    assert listener.num_connections == 3
    writers.pop().close()
    writers.append(await fourth)
    for writer in writers:
        writer.close()
    await until(lambda: listener.num_connections == 0)


async def test_who_is_ahead_leaves_the_next_one_to_others_for_a_moment(
    sock: CountedSocket, listeners: list[Listener]
) -> None:
    """And takes it when nobody else did."""
    counts = [0, 0]
    is_alone = False

    def count(i: int, change: int) -> None:
        counts[i] += change

    first = Listener(sock, make_connection, is_ahead=lambda: counts[0] > counts[1], count=lambda n: count(0, n))
    listeners.append(first)
    writers = [await ask(sock), await ask(sock)]
    assert counts == [2, 0]
    assert sock.num_asked >= 2
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as shared:
        second = Listener(
            shared, make_connection, is_ahead=lambda: is_alone or counts[1] > counts[0], count=lambda n: count(1, n)
        )
        writers += [await ask(sock), await ask(sock)]
        assert counts == [2, 2]
        first.close()
        is_alone = True
        writers.append(await ask(sock))
        assert counts == [2, 3]
        for writer in writers:
            writer.close()
        await until(lambda: counts == [0, 0])
        second.close()


def run_on(loop_factory: object, main: object) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:  # type: ignore[arg-type]
        runner.run(main)  # type: ignore[arg-type]


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tls(loop_factory: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who speaks no TLS does no harm, nor does who says nothing."""
    certificate, key = write_pair(tmp_path, "server")
    tls = ssl.create_default_context(cafile=certificate)
    counts: list[int] = []

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            listener = Listener(sock, make_connection, server_context(certificate, key), count=counts.append)
            silent = await asyncio.open_connection(*sock.getsockname())
            for data in (LIVE, b"\x16\x03\x01\x02\x00\x01\x00", b""):
                reader, writer = await asyncio.open_connection(*sock.getsockname())
                writer.write(data)
                writer.write_eof()
                async with asyncio.timeout(20):
                    assert b"HTTP" not in await reader.read()
                writer.close()
            served = await ask(sock, tls)
            await until(lambda: sum(counts) == 2)
            served.close()
            silent[1].close()
            await until(lambda: sum(counts) == 0)
            assert listener.num_connections == 0
            listener.close()
            await asyncio.sleep(0.05)

    with caplog.at_level(logging.WARNING):
        run_on(loop_factory, main())
    assert caplog.records == []
    assert len(counts) == 10


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_no_delay(loop_factory: object) -> None:
    """Small pieces of a stream must not wait for each other's acknowledgement; on both sides of the proxy."""
    transports: list[asyncio.BaseTransport] = []

    class Noting(ClientConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transports.append(transport)
            super().connection_made(transport)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            listener = Listener(sock, lambda: Noting(serve, ConnectionLimits(), set()))
            writer = await ask(sock)
            for transport in (*transports, writer.transport):
                ours = transport.get_extra_info("socket")
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            await until(lambda: listener.num_connections == 0)
            listener.close()

    run_on(loop_factory, main())


async def test_a_full_disk_and_few_descriptors(tmp_path: Path) -> None:
    """A real proxy that can write no log, and to which more clients come than it has descriptors."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with StandinEngine() as prefill, StandinEngine() as decode, aiohttp.ClientSession() as client:
        command = (
            f"ulimit -n 80; exec {sys.executable} -m services.global_proxy --port {port} --prefill {prefill.url} "
            f"--decode {decode.url} --key-file {tmp_path / 'key'} 2>/dev/full"
        )
        process = await asyncio.create_subprocess_exec("sh", "-c", command)
        url = f"http://127.0.0.1:{port}"
        idle: list[asyncio.StreamWriter] = []
        try:
            async with asyncio.timeout(60):
                while True:
                    try:
                        async with client.get(f"{url}/health") as response:
                            if response.status == 200:
                                break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.1)
            for _ in range(60):
                idle.append((await asyncio.open_connection("127.0.0.1", port))[1])
            await asyncio.sleep(0.3)
            prompt = {"model": "m", "prompt": "Hello"}
            async with asyncio.timeout(30):
                for _ in range(3):  # on the connection that there is
                    async with client.post(f"{url}/v1/completions", json=prompt) as response:
                        assert response.status == 200
            for writer in idle:
                writer.close()
            async with (
                asyncio.timeout(30),
                aiohttp.ClientSession() as newcomer,
                newcomer.post(f"{url}/v1/completions", json=prompt) as response,
            ):
                assert response.status == 200
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_who_is_ahead_does_not_even_ask_at_first(
    sock: CountedSocket, listeners: list[Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_YIELD_S", 0.3)
    listener = Listener(sock, make_connection, is_ahead=lambda: True)
    listeners.append(listener)
    with socket.create_connection(sock.getsockname()):
        for _ in range(3):
            await asyncio.sleep(0.01)
        assert sock.num_asked == 0
        await until(lambda: listener.num_connections == 1)
    await until(lambda: listener.num_connections == 0)
