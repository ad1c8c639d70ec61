"""The bytes of all bodies, counted from their coming to the answer."""

import pytest

from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.request_parser import RequestParser
from tests.services.global_proxy.http.raw_client import HEAD, statuses
from tests.services.global_proxy.http.serving import Server, attached, several_turns
from tests.services.global_proxy.http.test_request_parser import LIMITS, PIPELINED, REFUSED, feed

LENGTH = b"Content-Length: %d\r\n\r\n"
BODY = HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000


@pytest.mark.parametrize("framed", [LENGTH % 600, b"Transfer-Encoding: chunked\r\n\r\n258\r\n"])
def test_bodies_share_what_there_is(framed: bytes) -> None:
    bodies = BodyBudget(1000)
    one, another = RequestParser(LIMITS, bodies=bodies), RequestParser(LIMITS, bodies=bodies)
    feed(HEAD + LENGTH % 600 + b"x" * 600, parser=one)
    assert bodies.num_bytes == 600
    feed(HEAD + framed + b"x" * 401, parser=another)
    assert another.refusal is not None
    assert (another.refusal.status, another.refusal.retry_after_s) == (503, 1)
    assert bodies.num_bytes == 600, "what is refused is not kept"
    another.forget_all()
    one.forget(one.ready.popleft())
    assert bodies.num_bytes == 0
    third = feed(HEAD + framed + b"x" * 401, parser=RequestParser(LIMITS, bodies=bodies))
    assert third.refusal is None
    assert bodies.num_bytes == 401


def test_a_body_that_is_announced_and_too_much_need_not_come() -> None:
    bodies = BodyBudget(1000)
    bodies.num_bytes = 401
    parser = feed(HEAD + LENGTH % 600, parser=RequestParser(LIMITS, bodies=bodies))
    assert parser.refusal is not None
    assert parser.refusal.status == 503
    assert feed(HEAD + LENGTH % 599, parser=RequestParser(LIMITS, bodies=bodies)).refusal is None


@pytest.mark.parametrize("piece_bytes", [1, 500, 4000])
@pytest.mark.parametrize("data", [*REFUSED.values(), (200, PIPELINED), (200, HEAD + LENGTH % 9 + b"part")])
def test_nothing_of_a_connection_that_has_ended_is_counted(data: tuple[int, bytes], piece_bytes: int) -> None:
    bodies = BodyBudget(10**6)
    first = HEAD + LENGTH % 5 + b"first"
    parser = feed(first + data[1], piece_bytes=piece_bytes, parser=RequestParser(LIMITS, bodies=bodies))
    taken = parser.ready.popleft()
    parser.forget_all()
    assert bodies.num_bytes == 5, "that one is being served"
    parser.forget(taken)
    assert bodies.num_bytes == 0


async def test_a_body_counts_until_its_request_is_answered(server: Server) -> None:
    server.gate.clear()
    connection, transport = attached(server)
    connection.data_received(BODY * 2 + BODY[:-1])
    await several_turns()
    assert server.bodies.num_bytes == 2999
    server.gate.set()
    await several_turns()
    assert server.bodies.num_bytes == 999
    transport.lost()
    assert server.bodies.num_bytes == 0


async def test_a_body_counts_until_its_request_has_ended_although_the_client_left(server: Server) -> None:
    server.gate.clear()
    connection, transport = attached(server)
    connection.data_received(BODY * 3)
    await several_turns()
    transport.lost()
    assert server.bodies.num_bytes == 1000
    await several_turns()  # the gate opens when the client is gone
    assert server.bodies.num_bytes == 0


async def test_a_body_for_which_there_is_no_room(server: Server) -> None:
    server.bodies.max_bytes = 999
    connection, transport = attached(server)
    connection.data_received(BODY.replace(b"Host", b"Expect: 100-continue\r\nHost"))
    answer = transport.taken()
    assert statuses(answer) == [503]
    assert b"\r\nretry-after: 1\r\n" in answer
    assert [refusal.reason for refusal in server.refusals] == ["overloaded"]
    transport.lost()
    assert server.bodies.num_bytes == 0
