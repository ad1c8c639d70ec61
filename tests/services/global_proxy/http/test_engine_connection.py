"""One engine's connection, without an engine."""

import asyncio

import pytest

from services.global_proxy.http.engine_connection import BrokenOffError, EngineConnection
from services.global_proxy.http.framing import LAST_CHUNK, as_chunk
from tests.services.global_proxy.http.fake_transport import FakeTransport

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = as_chunk(b"data: x\n\n")


class Taker:
    def __init__(self) -> None:
        self.taken: list[tuple[bytes, bool]] = []

    def take(self, data: bytes, done: bool) -> None:
        self.taken.append((data, done))


@pytest.fixture
async def closed() -> list[EngineConnection]:
    return []


@pytest.fixture
async def connection(closed: list[EngineConnection]) -> EngineConnection:
    return EngineConnection(closed.append)


@pytest.fixture
async def transport(connection: EngineConnection) -> FakeTransport:
    return FakeTransport(connection)


@pytest.fixture
async def streaming(connection: EngineConnection, transport: FakeTransport) -> EngineConnection:
    """One whose stream has begun."""
    answer = connection.send(b"request")
    connection.data_received(STREAM)
    assert not answer.done(), "before its first byte a stream may still be asked for elsewhere"
    connection.data_received(EVENT)
    await answer
    return connection


async def test_one_request_after_the_other(connection: EngineConnection, transport: FakeTransport) -> None:
    for request in (b"first", b"second"):
        answer = connection.send(request)
        assert transport.taken() == request
        for byte in WHOLE:
            assert not answer.done()
            connection.data_received(bytes([byte]))
        assert (await answer).body == b"hi"
        assert connection.make_ready()
    assert not transport.aborted


async def test_a_whole_answer_in_chunks(connection: EngineConnection, transport: FakeTransport) -> None:
    answer = connection.send(b"")
    connection.data_received(b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi")
    connection.data_received(b"\r\n" + LAST_CHUNK)
    assert ((await answer).head.status, answer.result().body) == (404, b"hi")
    assert connection.make_ready()


async def test_interim_answers_are_passed_over(connection: EngineConnection, transport: FakeTransport) -> None:
    """Any number of them in one piece, and one cut in two."""
    answer = connection.send(b"")
    connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n" * 2000 + b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n")
    connection.data_received(b"\r\n" + WHOLE)
    assert (await answer).head.status == 200


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(connection: EngineConnection, transport: FakeTransport, status: int) -> None:
    answer = connection.send(b"")
    connection.data_received(b"HTTP/1.1 %d X\r\ncontent-length: 9\r\n\r\n" % status)
    assert (await answer).body == b""
    assert connection.make_ready()


async def test_a_break_is_unseen_only_on_a_used_connection(
    connection: EngineConnection, transport: FakeTransport, closed: list[EngineConnection]
) -> None:
    answer = connection.send(b"")
    connection.data_received(WHOLE)
    await answer
    assert connection.make_ready()
    answer = connection.send(b"")
    transport.lost()
    with pytest.raises(BrokenOffError) as caught:
        await answer
    assert caught.value.unseen
    assert closed == [connection]


@pytest.mark.parametrize("seen", [b"", b"H", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nh"])
async def test_a_break_on_a_new_connection_may_have_been_seen(
    connection: EngineConnection, transport: FakeTransport, seen: bytes
) -> None:
    answer = connection.send(b"")
    if seen:
        connection.data_received(seen)
    transport.lost()
    with pytest.raises(BrokenOffError) as caught:
        await answer
    assert not caught.value.unseen


async def test_a_break_after_the_first_bytes_was_seen(connection: EngineConnection, transport: FakeTransport) -> None:
    answer = connection.send(b"")
    connection.data_received(WHOLE)
    await answer
    assert connection.make_ready()
    answer = connection.send(b"")
    connection.data_received(b"HTTP/1.1 ")
    transport.lost()
    with pytest.raises(BrokenOffError) as caught:
        await answer
    assert not caught.value.unseen


async def test_what_was_never_sent_was_not_seen(connection: EngineConnection, transport: FakeTransport) -> None:
    transport.lost()
    with pytest.raises(BrokenOffError) as caught:
        await connection.send(b"request")
    assert caught.value.unseen
    assert transport.taken() == b""


async def test_bytes_that_nobody_asked_for(connection: EngineConnection, transport: FakeTransport) -> None:
    """They must not become the answer to the next request."""
    answer = connection.send(b"")
    connection.data_received(WHOLE)
    await answer
    assert connection.make_ready()
    connection.data_received(WHOLE)
    assert transport.aborted
    assert connection.closed, "at once: the event loop tells only later"


async def test_bytes_after_the_end(connection: EngineConnection, transport: FakeTransport) -> None:
    answer = connection.send(b"")
    connection.data_received(WHOLE)
    connection.data_received(b"HTTP/1.1 200 OK\r\n")
    await answer
    assert not connection.make_ready()


@pytest.mark.parametrize(
    "data",
    [
        WHOLE + b"!",
        b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
    ],
)
async def test_nonsense(connection: EngineConnection, transport: FakeTransport, data: bytes) -> None:
    answer = connection.send(b"")
    connection.data_received(data)
    with pytest.raises(BrokenOffError):
        await answer
    assert transport.aborted
    transport.lost()


async def test_an_endless_head_in_pieces(connection: EngineConnection, transport: FakeTransport) -> None:
    answer = connection.send(b"")
    connection.data_received(b"HTTP/1.1 200 OK\r\n")
    for _ in range(1000):
        if not transport.aborted:
            connection.data_received(b"x: " + b"y" * 95 + b"\r\n")
    assert transport.aborted
    assert answer.exception() is not None


async def test_a_stream_is_passed_on_in_whole_chunks(streaming: EngineConnection, transport: FakeTransport) -> None:
    taker = Taker()
    relayed = streaming.relay_to(taker)
    for byte in EVENT + EVENT[:-1]:
        streaming.data_received(bytes([byte]))
    streaming.data_received(EVENT[-1:] + EVENT + LAST_CHUNK[:2])
    assert not relayed.done()
    streaming.data_received(LAST_CHUNK[2:])
    await relayed
    assert taker.taken == [(EVENT, False), (EVENT, False), (EVENT + EVENT, False), (LAST_CHUNK, True)]
    assert streaming.make_ready()


async def test_an_engine_that_dies_inside_a_chunk(streaming: EngineConnection, transport: FakeTransport) -> None:
    taker = Taker()
    relayed = streaming.relay_to(taker)
    streaming.data_received(EVENT + EVENT[:-3])
    transport.lost()
    with pytest.raises(BrokenOffError):
        await relayed
    assert taker.taken == [(EVENT, False), (EVENT, False)]
    assert not streaming.make_ready()


async def test_an_engine_that_died_before_the_stream_was_taken(
    streaming: EngineConnection, transport: FakeTransport
) -> None:
    transport.lost()
    taker = Taker()
    with pytest.raises(BrokenOffError):
        await streaming.relay_to(taker)
    assert taker.taken == [(EVENT, False)]


@pytest.mark.parametrize("at_once", [True, False])
async def test_nonsense_in_a_stream(streaming: EngineConnection, transport: FakeTransport, at_once: bool) -> None:
    taker = Taker()
    if at_once:
        streaming.data_received(b"zz\r\n")
    relayed = streaming.relay_to(taker)
    if not at_once:
        streaming.data_received(b"zz\r\n")
    with pytest.raises(BrokenOffError):
        await relayed
    assert transport.aborted


async def test_bytes_after_a_streams_end(streaming: EngineConnection, transport: FakeTransport) -> None:
    taker = Taker()
    relayed = streaming.relay_to(taker)
    streaming.data_received(LAST_CHUNK)
    streaming.data_received(EVENT)
    await relayed
    assert taker.taken[-1] == (LAST_CHUNK, True)
    assert not streaming.make_ready()


async def test_a_stream_that_nobody_takes_is_bounded(streaming: EngineConnection, transport: FakeTransport) -> None:
    big = as_chunk(b"x" * 65536)
    for _ in range(8):
        if transport.reading:
            streaming.data_received(big)
    assert not transport.reading
    taker = Taker()
    relayed = streaming.relay_to(taker)
    assert transport.reading
    assert sum(len(data) for data, _ in taker.taken) < 400_000
    streaming.data_received(LAST_CHUNK)
    await relayed


async def test_a_client_that_is_behind_from_the_start(streaming: EngineConnection, transport: FakeTransport) -> None:
    """Taking the stream must not undo the pause."""
    streaming.pause()
    relayed = streaming.relay_to(Taker())
    assert not transport.reading
    streaming.resume()
    assert transport.reading
    relayed.cancel()


async def test_the_next_request_on_a_paused_connection_is_answered(
    streaming: EngineConnection, transport: FakeTransport
) -> None:
    """The last bytes of a stream may have put the client behind."""
    relayed = streaming.relay_to(Taker())
    streaming.data_received(LAST_CHUNK)
    streaming.pause()
    await relayed
    assert streaming.make_ready()
    assert transport.reading


async def test_nothing_is_passed_on_after_an_abort(streaming: EngineConnection, transport: FakeTransport) -> None:
    taker = Taker()
    relayed = streaming.relay_to(taker)
    streaming.abort()
    streaming.data_received(EVENT)
    transport.lost()
    assert taker.taken == [(EVENT, False)]
    assert isinstance(relayed.exception(), BrokenOffError)


async def test_a_stream_that_was_not_taken_is_not_used_again(
    streaming: EngineConnection, transport: FakeTransport
) -> None:
    assert not streaming.make_ready()


async def test_a_cancelled_request_is_not_used_again(connection: EngineConnection, transport: FakeTransport) -> None:
    answer = connection.send(b"")
    answer.cancel()
    connection.data_received(WHOLE)
    assert not connection.make_ready()
    with pytest.raises(asyncio.CancelledError):
        await answer
