"""One client's connection alone: patience, order and bounds."""

import asyncio
from collections.abc import Callable

import pytest

from services.global_proxy.http import client_connection
from services.global_proxy.http.client_connection import ClientConnection, ConnectionLimits
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from tests.services.global_proxy.conftest import until
from tests.services.global_proxy.http.fake_transport import FakeTransport
from tests.services.global_proxy.http.raw_client import HEAD, LIVE, rest, statuses
from tests.services.global_proxy.http.serving import Server, attached, several_turns, trickle


@pytest.mark.parametrize(
    ("begun", "rest_of_it", "limits", "what"),
    [
        (b"", HEAD + b"X: y\r\n" * 50, {"head_timeout_s": 0.3}, b"headers"),
        (HEAD + b"Content-Length: 999\r\n\r\n", b"x" * 900, {"body_timeout_s": 0.3}, b"body"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 150, {"body_timeout_s": 0.3}, b"body"),
        (LIVE + HEAD, b"X: y\r\n" * 50, {"head_timeout_s": 0.3}, b"headers"),
    ],
)
async def test_slow_sender(
    server: Server, begun: bytes, rest_of_it: bytes, limits: dict[str, float], what: bytes
) -> None:
    """However often it sends a byte, its time is over when it is over."""
    reader, writer = await server.listen(**limits)
    writer.write(begun)
    sending = asyncio.create_task(trickle(writer, rest_of_it, 0.05))
    answer = await rest(reader)
    assert statuses(answer)[-1] == 408
    assert b"The request %b did not arrive in time" % what in answer
    assert [refusal.reason for refusal in server.refusals] == ["invalid"]
    sending.cancel()
    writer.close()


async def test_idle_connections_are_closed(server: Server) -> None:
    """Empty lines do not keep them open."""
    reader, writer = await server.listen(idle_timeout_s=0.3)
    writer.write(LIVE)
    sending = asyncio.create_task(trickle(writer, b"\r\n" * 200, 0.05))
    assert statuses(await rest(reader)) == [200]
    sending.cancel()
    writer.close()
    await until(lambda: server.num_lost == 1)


async def test_a_client_that_leaves_is_told_once(server: Server) -> None:
    server.gate.clear()
    _, writer = await server.listen()
    writer.write(LIVE)
    await until(lambda: len(server.served) == 1)
    writer.close()
    await until(lambda: server.num_lost == 1)
    assert server.num_gone == 1
    assert server.connections == set()


async def test_a_pipelined_flood_is_bounded(server: Server) -> None:
    """While the first is served no more is read than fits, and none of it becomes objects."""
    server.gate.clear()
    _, writer = await server.listen()
    for _ in range(400):
        writer.write(LIVE * 500)
    await until(lambda: len(server.served) == 1)
    connection = next(iter(server.connections))
    await until(lambda: not connection._reading)
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert len(connection._unparsed) < 64 * 1024 + 2**19
    assert len(connection._parser.ready) <= 16 * 1024 // len(LIVE)
    server.gate.set()
    await until(lambda: len(server.served) > 100)
    writer.transport.abort()


async def test_who_does_not_read_answers_gets_no_more_of_them(server: Server) -> None:
    connection, transport = attached(server)
    connection.data_received(LIVE * 3)
    connection.pause_writing()
    await several_turns()
    connection.data_received(LIVE)
    assert len(server.served) == 1
    assert len(connection._parser.ready) == 2, "nor is more parsed"
    connection.resume_writing()
    await several_turns()
    assert len(server.served) == 4
    transport.lost()


async def test_no_timeout_of_the_clients_ends_our_own_work(server: Server) -> None:
    server.gate.clear()
    connection, transport = attached(server, idle_timeout_s=0.05, head_timeout_s=0.05, body_timeout_s=0.05)
    connection.data_received(LIVE)
    await asyncio.sleep(0.2)
    assert not transport.closing
    server.gate.set()
    await several_turns()
    assert statuses(transport.taken()) == [200]
    transport.lost()


async def test_who_leaves_before_the_answer_is_gone_at_once(server: Server) -> None:
    """Closing would wait for what was written to be read."""
    server.gate.clear()
    connection, transport = attached(server)
    connection.data_received(LIVE)
    await several_turns()
    assert connection.eof_received() is False
    assert transport.aborted
    transport.lost()
    assert server.num_gone == 1


async def test_a_large_answer_to_a_client_that_is_gone_half_way(server: Server) -> None:
    """It has shut down its sending half and reads nothing: not even closing may wait for it for ever."""
    connection, transport = attached(server, reader_timeout_s=0.05)
    connection.data_received(LIVE)
    await several_turns()
    assert connection.eof_received() is False
    assert transport.closing
    await until(lambda: transport.aborted)
    transport.lost()


async def test_an_answer_that_ends_too_early_breaks_the_connection(server: Server) -> None:
    async def serve(request: ClientRequest, reply: Reply) -> None:
        reply.start(200, b"text/plain")

    connection = ClientConnection(serve, ConnectionLimits(), set())
    transport = FakeTransport(connection)
    connection.data_received(LIVE)
    await several_turns()
    assert transport.aborted
    transport.lost()


async def test_drain(server: Server) -> None:
    server.gate.clear()
    idle, of_idle = attached(server)
    busy, of_busy = attached(server)
    busy.data_received(LIVE * 2)
    await several_turns()
    for connection in (idle, busy):
        connection.drain()
    assert of_idle.closing
    assert not of_busy.closing
    server.gate.set()
    await several_turns()
    assert of_busy.closing
    assert b"connection: close" in of_busy.taken()
    assert len(server.served) == 1
    of_idle.lost()
    of_busy.lost()


async def test_one_request_after_the_other_costs_no_timers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connection, transport = attached(server)
    loop = asyncio.get_running_loop()
    num_timers = 0
    call_at: Callable[..., asyncio.TimerHandle] = loop.call_at

    def counted(*args: object) -> asyncio.TimerHandle:
        nonlocal num_timers
        num_timers += 1
        return call_at(*args)

    monkeypatch.setattr(loop, "call_at", counted)
    for _ in range(10):
        connection.data_received(LIVE)
        await several_turns()
    assert len(server.served) == 10
    assert num_timers == 0
    transport.lost()


async def test_large_pieces_are_fed_in_small_ones(server: Server) -> None:
    connection, transport = attached(server)
    body = b"x" * 100_000
    connection.data_received(HEAD + b"Content-Length: 100000\r\n\r\n" + body + LIVE * 2000)
    assert len(connection._parser.ready) <= client_connection._FEED_BYTES // len(LIVE)
    async with asyncio.timeout(20):
        while len(server.served) < 2001:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert server.served_bodies[0] == body
    transport.lost()
