"""Which connection the next request goes over."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from services.global_proxy.http import engine_endpoint
from services.global_proxy.http.engine_connection import EngineConnection
from services.global_proxy.http.engine_endpoint import EngineEndpoint, NoConnectionError
from tests.services.global_proxy.conftest import until

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Engine:
    """Answers every request at once, and notes it."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while request := await reader.read(65536):
                self.requests.append(request)
                writer.write(ANSWER)
        except ConnectionResetError:
            pass  # the proxy aborts what it does not want any more
        finally:
            writer.close()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def endpoint(engine: Engine) -> AsyncIterator[EngineEndpoint]:
    async with await asyncio.start_server(engine.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        made = EngineEndpoint(f"http://127.0.0.1:{port}", 5.0)
        yield made
        made.abort_all()
        await until(lambda: not made._open)


async def ask(endpoint: EngineEndpoint, connection: EngineConnection) -> None:
    async with asyncio.timeout(20):
        answer = await connection.send(endpoint.request(b"POST", b"/v1/completions", b"x: y\r\n", b"{}"))
    assert answer.head.status == 200
    endpoint.give_back(connection)


async def test_the_newest_idle_connection_is_used_again(endpoint: EngineEndpoint, engine: Engine) -> None:
    first, second = await endpoint.connect(), await endpoint.connect()
    await ask(endpoint, first)
    await ask(endpoint, second)
    assert endpoint.idle_connection() is second
    assert endpoint.idle_connection() is first
    assert endpoint.idle_connection() is None
    assert engine.requests[0] == (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nx: y\r\ncontent-length: 2\r\n\r\n{}" % endpoint.port
    )


async def test_a_connection_is_not_used_after_the_engine_may_have_closed_it(
    endpoint: EngineEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await endpoint.connect()
    await ask(endpoint, connection)
    monkeypatch.setattr(engine_endpoint, "_KEEPALIVE_S", 0.0)
    assert endpoint.idle_connection() is None
    assert connection.closed
    await until(lambda: not endpoint._open)


async def test_an_idle_connection_that_is_closed_is_forgotten(endpoint: EngineEndpoint) -> None:
    connection = await endpoint.connect()
    await ask(endpoint, connection)
    connection.abort()
    await until(lambda: not endpoint._open)
    assert endpoint.idle_connection() is None


async def test_an_unfinished_request_is_broken_off(endpoint: EngineEndpoint) -> None:
    connection = await endpoint.connect()
    answer = connection.send(b"")
    endpoint.give_back(connection)
    assert connection.closed
    await until(lambda: answer.done())
    assert answer.exception() is not None


async def test_all_are_broken_off(endpoint: EngineEndpoint) -> None:
    idle, busy = await endpoint.connect(), await endpoint.connect()
    await ask(endpoint, idle)
    answer = busy.send(b"")
    endpoint.abort_all()
    await until(lambda: answer.done() and not endpoint._open)
    assert answer.exception() is not None
    assert endpoint.idle_connection() is None


async def test_nobody_there(refused_url: str) -> None:
    with pytest.raises(NoConnectionError) as caught:
        await EngineEndpoint(refused_url, 5.0).connect()
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_nobody_answers() -> None:
    """The queue of a listening socket is full, so that the kernel lets the newcomer wait."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as sock,
        socket.create_connection(sock.getsockname()),
        pytest.raises(NoConnectionError, match=r"no connection within 0\.05 s"),
    ):
        await EngineEndpoint("http://{}:{}".format(*sock.getsockname()), 0.05).connect()
