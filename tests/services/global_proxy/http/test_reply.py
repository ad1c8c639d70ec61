"""Answers, byte by byte."""

import asyncio
import re

import pytest

from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.engine_connection import EngineConnection
from services.global_proxy.http.framing import LAST_CHUNK, as_chunk
from services.global_proxy.http.reply import Reply
from tests.services.global_proxy.http.fake_transport import FakeTransport

_DATE = re.compile(rb"date: [A-Z][a-z][a-z], \d\d [A-Z][a-z][a-z] \d{4} \d\d:\d\d:\d\d GMT\r\n")


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


def make_reply(transport: FakeTransport, closing: bool = False, **of_request: object) -> Reply:
    return Reply(transport, ClientRequest(**of_request), closing)  # type: ignore[arg-type]


def without_date(answer: bytes) -> bytes:
    head, end, body = answer.partition(b"\r\n\r\n")
    head, num_dates = _DATE.subn(b"", head + b"\r\n")
    assert num_dates == 1
    return head + end[2:] + body


def test_a_whole_answer(transport: FakeTransport) -> None:
    reply = make_reply(transport)
    reply.headers.append((b"x-request-id", b"1"))
    reply.whole(404, b"text/plain", b"no", [(b"retry-after", b"7")])
    assert without_date(transport.taken()) == (
        b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n"
        b"x-request-id: 1\r\nretry-after: 7\r\n\r\nno"
    )
    assert (reply.status, reply.complete, reply.num_bytes) == (404, True, 2)


def test_a_stream(transport: FakeTransport) -> None:
    reply = make_reply(transport)
    reply.start(200, b"text/event-stream")
    assert without_date(transport.taken()) == (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    reply.take(as_chunk(b"data: x\n\n"))
    assert not reply.complete
    reply.take(LAST_CHUNK, True)
    reply.end()
    assert transport.taken() == as_chunk(b"data: x\n\n") + LAST_CHUNK


def test_a_stream_to_an_old_client_has_no_framing(transport: FakeTransport) -> None:
    reply = make_reply(transport, takes_chunks=False)
    assert reply.closing
    reply.start(200, b"text/event-stream")
    answer = transport.taken()
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"connection: close\r\n\r\n")
    reply.take(as_chunk(b"one") + as_chunk(b"two"))
    reply.take(as_chunk(b"three") + LAST_CHUNK, True)
    reply.end()
    assert transport.taken() == b"onetwothree"


def test_head_has_no_body(transport: FakeTransport) -> None:
    make_reply(transport, method="HEAD").whole(200, b"text/plain", b"body")
    assert without_date(transport.taken()).endswith(b"content-length: 4\r\n\r\n")
    reply = make_reply(transport, method="HEAD")
    reply.start(200, b"text/plain")
    transport.taken()
    reply.take(as_chunk(b"x"))
    reply.end()
    assert transport.taken() == b""
    assert reply.complete


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(transport: FakeTransport, status: int) -> None:
    make_reply(transport).whole(status, b"text/plain", b"body")
    answer = transport.taken()
    assert b"content-length" not in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("takes_chunks", [True, False])
def test_an_event_of_ours_never_lands_inside_of_another(transport: FakeTransport, takes_chunks: bool) -> None:
    for last, expected in ((b"data: x\n\n", b"data: error\n\n"), (b"data: {", b"\n\ndata: error\n\n")):
        reply = make_reply(transport, takes_chunks=takes_chunks)
        reply.start(200, b"text/event-stream")
        reply.take(as_chunk(last))
        transport.taken()
        reply.event(b"data: error\n\n")
        assert transport.taken() == (as_chunk(expected) if takes_chunks else expected)


def test_an_unknown_status_is_passed_on(transport: FakeTransport) -> None:
    make_reply(transport).whole(599, b"text/plain", b"")
    assert transport.taken().startswith(b"HTTP/1.1 599 \r\n")


async def test_a_client_that_is_behind_pauses_the_source(transport: FakeTransport) -> None:
    first, second = EngineConnection(lambda c: None), EngineConnection(lambda c: None)
    of_first, of_second = FakeTransport(first), FakeTransport(second)
    reply = make_reply(transport)
    reply.fed_by(first)
    reply.pause()
    assert not of_first.reading
    reply.fed_by(None)
    reply.fed_by(second)
    assert not of_second.reading
    reply.resume()
    assert of_second.reading
    assert not of_first.reading


async def test_waiting_for_a_client_that_is_behind(transport: FakeTransport) -> None:
    reply = make_reply(transport)
    await reply.writable()
    reply.pause()
    waiting = asyncio.create_task(reply.writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    reply.resume()
    async with asyncio.timeout(5):
        await waiting
