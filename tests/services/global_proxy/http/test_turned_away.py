"""Who is turned away at the door: answered by the head alone."""

import asyncio

import pytest

from services.global_proxy.errors import InvalidRequestError
from services.global_proxy.http import client_connection
from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.request_parser import RequestLimits, RequestParser
from services.global_proxy.security.routes import Route
from tests.services.global_proxy.conftest import until
from tests.services.global_proxy.http.raw_client import LIVE, rest, statuses
from tests.services.global_proxy.http.serving import Server, attached, several_turns, trickle
from tests.services.global_proxy.http.test_request_parser import HEAD, LIMITS, SMUGGLED, feed

STRANGER = b"POST /wrong HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n"
MAY = Route("/v1/completions", frozenset(), "completion")
MAY_A_LITTLE = Route("/little", frozenset(), "local", max_body_bytes=3)


class Door:
    """Turns away from /wrong, and lets only 3 bytes to /little."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def look(self, request: ClientRequest) -> None:
        self.seen.append(request.path)
        assert request.headers[b"host"] == b"x"
        if request.path == "/wrong":
            request.turned_away = InvalidRequestError("wrong")
        else:
            request.entry = (MAY_A_LITTLE if request.path == "/little" else MAY, None)


@pytest.mark.parametrize("head", [HEAD + LENGTH % 1000, STRANGER + LENGTH % 1000])
def test_the_door_sees_a_head_as_soon_as_it_is_complete(head: bytes) -> None:
    door = Door()
    parser = RequestParser(LIMITS, "", door.look)
    parser.feed(head[:-1])
    assert door.seen == []
    parser.feed(head[-1:])
    assert len(door.seen) == 1


@pytest.mark.parametrize("piece_bytes", [1, 7, 4000])
@pytest.mark.parametrize("num_bytes", [0, 900])
def test_a_small_body_of_who_is_turned_away_is_read_past(num_bytes: int, piece_bytes: int) -> None:
    bodies = BodyBudget(10**6)
    data = STRANGER + LENGTH % num_bytes + b"x" * num_bytes + HEAD + LENGTH % 2 + b"ok"
    parser = feed(data, piece_bytes=piece_bytes, parser=RequestParser(LIMITS, "", Door().look, bodies))
    first, second = parser.ready
    assert first.turned_away is not None
    assert not first.body
    assert first.keep_alive
    assert (second.turned_away, bytes(second.body)) == (None, b"ok")
    assert not parser.ended
    assert bodies.num_bytes == 2


@pytest.mark.parametrize("piece_bytes", [1, 7, 4000])
@pytest.mark.parametrize(
    "framed",
    [
        LENGTH % (64 * 1024 + 1) + b"x" * 1000,
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"Expect: 100-continue\r\n" + LENGTH % 5,
        b"Expect: 100-continue\r\n" + LENGTH % 5 + b"hello",
        b"Expect: 100-continue\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + LENGTH % 0,
    ],
)
def test_any_other_body_of_who_is_turned_away_ends_the_connection(framed: bytes, piece_bytes: int) -> None:
    """It is answered before that body comes, and nothing that comes is taken for a request."""
    door = Door()
    good = HEAD + LENGTH % 5 + b"first"
    bodies = BodyBudget(10**6)
    parser = RequestParser(RequestLimits(), "", door.look, bodies)
    feed(good + STRANGER + framed + SMUGGLED, piece_bytes=piece_bytes, parser=parser)
    assert parser.ended
    assert parser.refusal is None
    assert not parser.awaits_continue
    first, second = parser.ready
    assert (first.turned_away, bytes(first.body)) == (None, b"first")
    assert second.turned_away is not None
    assert not second.keep_alive
    assert not second.body
    assert door.seen == ["/v1/completions", "/wrong"]
    assert bodies.num_bytes == 5
    with pytest.raises(AssertionError):
        parser.feed(b"x")


def test_a_routes_own_limit_holds_for_chunks() -> None:
    """And for that request alone."""
    little = b"GET /little HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n"
    door = Door()
    parser = feed(little + b"0\r\n\r\n" + HEAD + LENGTH % 4 + b"many", parser=RequestParser(LIMITS, "", door.look))
    assert [bytes(request.body) for request in parser.ready] == [b"abc", b"many"]
    parser = feed(little + b"1\r\nd\r\n0\r\n\r\n" + SMUGGLED, parser=RequestParser(LIMITS, "", door.look))
    assert parser.refusal is not None
    assert (parser.refusal.status, parser.refusal.message) == (413, "The request body is larger than 3 bytes")
    assert not parser.ready


LARGE = STRANGER + b"Content-Length: 9999999\r\n\r\n"


async def test_who_is_turned_away_is_answered_before_the_body_comes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turn; what comes of the body is read, and not kept, until the client has had time to read the answer."""
    monkeypatch.setattr(client_connection, "_LINGER_S", 0.05)
    server.gate.clear()
    connection, transport = attached(server)
    connection.data_received(LIVE + LARGE + b"x" * 1000)
    await several_turns()
    for _ in range(30):
        connection.data_received(b"x" * 5000)
        if not transport.reading:
            break
    assert not transport.reading, "until the first is answered"
    server.gate.set()
    await several_turns()
    answers = transport.taken()
    assert statuses(answers) == [200, 404]
    assert answers.count(b"connection: close") == 1
    assert transport.closing, "after the answer"
    assert transport.reading
    connection.data_received(LIVE * 100)
    assert not connection._unparsed
    assert len(server.served) == 2
    assert not transport.aborted
    await until(lambda: transport.aborted)
    transport.lost()
    assert server.bodies.num_bytes == 0


async def test_a_small_body_is_read_past_and_the_connection_stays(server: Server) -> None:
    connection, transport = attached(server)
    connection.data_received(STRANGER + b"Content-Length: 60000\r\n\r\n")
    await several_turns()
    for _ in range(60):
        connection.data_received(b"x" * 1000)
    await several_turns()
    connection.data_received(LIVE)
    await several_turns()
    assert statuses(transport.taken()) == [404, 200]
    assert not server.served[0].body
    assert not transport.closing
    transport.lost()


async def test_who_is_turned_away_has_no_longer_to_send_than_others(server: Server) -> None:
    reader, writer = await server.listen(body_timeout_s=0.3)
    writer.write(STRANGER + b"Content-Length: 999\r\n\r\n")
    sending = asyncio.create_task(trickle(writer, b"x" * 900, 0.05))
    assert statuses(await rest(reader)) == [408]
    sending.cancel()
    writer.close()


async def test_no_go_ahead_for_who_is_turned_away(server: Server) -> None:
    connection, transport = attached(server)
    connection.data_received(STRANGER + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    await several_turns()
    assert statuses(transport.taken()) == [404]
    assert transport.closing
    transport.lost()


async def test_draining_hangs_up_as_gently_on_who_is_turned_away(server: Server) -> None:
    server.gate.clear()
    connection, transport = attached(server)
    connection.data_received(LIVE + LARGE)
    await several_turns()
    connection.drain()
    server.gate.set()
    await several_turns()
    assert statuses(transport.taken()) == [200]
    assert transport.closing
    connection.data_received(b"x" * 1000)
    assert not connection._unparsed
    transport.lost()
