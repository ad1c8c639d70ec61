"""Requests within bounds, however their bytes are split; everything else is refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.global_proxy.http.request_parser import RequestLimits, RequestParser

LIMITS = RequestLimits(max_head_bytes=2000, max_headers=20, max_body_bytes=1000)
HEAD = b"POST /v1/completions?q=1 HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nx-a: 2\r\n"
PIPELINED = (
    b"\r\n"
    + HEAD
    + b"Content-Length: 5\r\n\r\nfirst"
    + HEAD
    + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n3\r\nsec\r\n3;x=y\r\nond\r\n0\r\nX-A: trailer\r\n\r\n"
    + b"GET /live HTTP/1.0\r\n\r\n"
)


def feed(
    data: bytes, limits: RequestLimits = LIMITS, piece_bytes: int = 500, parser: RequestParser | None = None
) -> RequestParser:
    parser = parser or RequestParser(limits)
    for start in range(0, len(data), piece_bytes):
        if parser.refusal is None and not parser.ended:
            parser.feed(data[start : start + piece_bytes])
    return parser


@given(st.lists(st.integers(1, len(PIPELINED) - 1), max_size=20))
def test_any_split(cuts: list[int]) -> None:
    parser = RequestParser(LIMITS)
    edges = [0, *sorted(cuts), len(PIPELINED)]
    for start, end in itertools.pairwise(edges):
        parser.feed(memoryview(PIPELINED)[start:end])
    assert parser.refusal is None
    first, second, third = parser.ready
    assert [bytes(request.body) for request in parser.ready] == [b"first", b"second", b""]
    assert (first.method, first.target, first.path, first.query) == (
        "POST",
        b"/v1/completions?q=1",
        "/v1/completions",
        b"q=1",
    )
    assert first.headers == {b"host": b"x", b"x-a": b"1, 2", b"content-length": b"5"}
    assert second.headers[b"x-a"] == b"1, 2", "trailers are no headers"
    assert (first.keep_alive, first.takes_chunks, third.keep_alive, third.takes_chunks) == (True, True, False, False)


def test_phases() -> None:
    parser = RequestParser(LIMITS)
    for data, phase, awaits in (
        (b"\r\n", "idle", False),
        (b"P", "head", False),
        (HEAD[1:], "head", False),
        (b"Content-Length: 2\r\nExpect: 100-Continue\r\n\r\n", "body", True),
        (b"a", "body", False),
        (b"b", "idle", False),
        (b"POST", "head", False),
    ):
        parser.feed(data)
        assert (parser.phase, parser.awaits_continue) == (phase, awaits)


SMUGGLED = b"GET /admin/v1/x HTTP/1.1\r\nHost: x\r\n\r\n"
REFUSED = {
    "both lengths": (400, HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    "both, the other way round": (400, HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, HEAD + b"Content-Length: 5\r\nContent-Length: 0\r\n\r\n" + SMUGGLED),
    "the same length twice": (400, HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na"),
    "two lengths in one line": (400, HEAD + b"Content-Length: 5, 5\r\n\r\n"),
    **{
        f"length {value!r}": (400, HEAD + b"Content-Length: %b\r\n\r\n" % value)
        for value in (b"", b"+1", b"-1", b"0x1", b"1_0", b"1 0", b"\x0b1", b"9" * 25)
    },
    **{
        f"encoding {value!r}": (400, HEAD + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n" % value)
        for value in (b"gzip", b"gzip, chunked", b"chunked, gzip", b"xchunked", b"\x0bchunked", b"identity", b"")
    },
    "encoding twice": (400, HEAD + b"Transfer-Encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "encoding of HTTP/1.0": (
        400,
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\n",
    ),
    "two hosts": (400, HEAD + b"host: x\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "no host, and a body": (400, b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
    "two authorizations": (400, HEAD + b"Authorization: a\r\nAuthorization: b\r\n\r\n"),
    "folded": (400, HEAD + b"X: a\r\n b\r\n\r\n"),
    "space before the colon": (400, HEAD + b"Content-Length : 5\r\n\r\n"),
    "space in a name": (400, HEAD + b"X Y: a\r\n\r\n"),
    "space before a name": (400, b"GET / HTTP/1.1\r\n Host: x\r\n\r\n"),
    "no colon": (400, HEAD + b"X\r\n\r\n"),
    "no name": (400, HEAD + b": a\r\n\r\n"),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
    "bare LF in a header": (400, HEAD + b"X: a\nY: b\r\n\r\n"),
    "bare CR in a header": (400, HEAD + b"X: a\rY: b\r\n\r\n"),
    "NUL": (400, HEAD + b"X: a\0b\r\n\r\n"),
    "control character": (400, HEAD + b"X: a\x01b\r\n\r\n"),
    "control character in the target": (400, b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n"),
    **{
        f"chunk {data!r}": (400, HEAD + b"Transfer-Encoding: chunked\r\n\r\n%b\r\n0\r\n\r\n" % data)
        for data in (
            b"0x1\r\na",
            b"-1\r\na",
            b"1_0\r\na",
            b" 1\r\na",
            b"1 \r\na",
            b"\r\n",
            b"1\r\nab",
            b"1\na",
            b"1\r\na\n",
            b"f" * 17,
            b"1;a\nb\r\na",
            b"g",
        )
    },
    "trailer that may come once": (400, HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA b: x\r\n\r\n"),
    "HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "version 2.0": (505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
    "version 0.9": (505, b"GET / HTTP/0.9\r\n\r\n"),
    "version 1.2": (400, b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "upgrade": (400, HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n" + SMUGGLED),
    "upgrade, and a body": (400, HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello"),
    "tunnel": (400, b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n" + SMUGGLED),
    "announced body": (413, HEAD + b"Content-Length: 1001\r\n\r\n"),
    "unannounced body": (413, HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001),
    "large header": (431, HEAD + b"X: " + b"y" * 2000 + b"\r\n\r\n"),
    "endless header": (431, HEAD + b"X: " + b"y" * 9000),
    "endless name": (431, HEAD + b"y" * 9000),
    "endless target": (431, b"GET /" + b"y" * 9000),
    "many headers": (431, HEAD + b"".join(b"x%d: 1\r\n" % i for i in range(20)) + b"\r\n"),
    "the same header often": (431, HEAD + b"x: 1\r\n" * 20 + b"\r\n"),
    "endless trailers": (431, HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"x: 1\r\n" * 1500),
    "an endless trailer": (431, HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 9000),
    "endless chunk extension": (431, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"y" * 9000),
    "endless empty lines": (431, b"\r\n" * 4500),
}


@pytest.mark.parametrize("piece_bytes", [1, 500, 4000])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, piece_bytes: int) -> None:
    status, data = REFUSED[name]
    parser = feed(data, piece_bytes=piece_bytes)
    assert parser.refusal is not None
    assert parser.refusal.status == status
    assert not parser.ready, "nothing of it is served"


@pytest.mark.parametrize("name", REFUSED)
def test_what_came_before_is_not_concerned(name: str) -> None:
    data = REFUSED[name][1]
    good = HEAD + b"Content-Length: 5\r\n\r\nfirst"
    parser = feed(good + data, piece_bytes=4000)
    assert [bytes(request.body) for request in parser.ready] == [b"first"]
    assert parser.refusal is not None or "endless" in name, "which is seen when the first has been taken"


@pytest.mark.parametrize("name", ["announced body", "unannounced body"])
def test_a_body_that_is_too_large_is_not_kept(name: str) -> None:
    assert not feed(REFUSED[name][1]).request.body


def test_within_the_limits() -> None:
    body = b"x" * 1000
    for framed in (
        b"Content-Length: 1000\r\n\r\n" + body,
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n",
    ):
        for piece_bytes in (1, 7, 100_000):
            parser = feed(HEAD + b"X: " + b"y" * 1800 + b"\r\n" + framed, piece_bytes=piece_bytes)
            assert parser.refusal is None
            assert parser.ready[0].body == body


def test_data_after_the_last_request_of_a_connection() -> None:
    parser = feed(HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n" + SMUGGLED)
    assert [request.keep_alive for request in parser.ready] == [False]


def test_many_repeats_of_a_header_take_linear_time() -> None:
    """No more values are joined than may be."""
    limits = RequestLimits(max_head_bytes=10**6, max_headers=10)
    parser = feed(HEAD + b"a:\r\n" * 10_000, limits, piece_bytes=16384)
    assert len(parser.request.headers[b"a"]) < 50
