"""What an engine's head says, and what is refused rather than guessed."""

import pytest

from services.global_proxy.http.framing import FramingError
from services.global_proxy.http.response_head import ResponseHead, parse_head


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((status, *lines))


def test_what_matters() -> None:
    parsed = parse_head(head(b"Content-Type:  a/b; c=d\t", b"CONTENT-LENGTH: 12", b"retry-after:3", b"X: y"))
    assert parsed == ResponseHead(200, b"a/b; c=d", b"3", True, 12)
    assert not parsed.is_stream


@pytest.mark.parametrize(
    ("lines", "keeps"),
    [((), True), ((b"Connection: Close",), False), ((b"connection: x, close",), False)],
)
def test_keep_alive(lines: tuple[bytes, ...], keeps: bool) -> None:
    assert parse_head(head(b"Content-Length: 0", *lines)).keep_alive is keeps
    old = head(b"Content-Length: 0", b"Connection: keep-alive", *lines, status=b"HTTP/1.0 200 OK")
    assert not parse_head(old).keep_alive


def test_only_chunked_events_are_a_stream() -> None:
    events = b"Content-Type: text/event-stream; charset=utf-8"
    assert parse_head(head(events, b"Transfer-Encoding: Chunked")).is_stream
    assert not parse_head(head(events, b"Content-Length: 5")).is_stream
    assert not parse_head(head(b"Transfer-Encoding: chunked")).is_stream


@pytest.mark.parametrize("status", [100, 103, 204, 304])
@pytest.mark.parametrize("lines", [(), (b"Content-Length: 5",), (b"Transfer-Encoding: chunked",)])
def test_answers_without_a_body(status: int, lines: tuple[bytes, ...]) -> None:
    assert parse_head(head(*lines, status=b"HTTP/1.1 %d X" % status)).num_bytes == 0


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 20x OK",
        b"HTTP/1.1 600 OK",
        b"ICY 200 OK",
        head(status=b"HTTP/1.1 101 Switching Protocols"),
        head(),
        head(b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        head(b"Content-Length: 1", b"Content-Length: 1"),
        head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        head(b"Transfer-Encoding: gzip, chunked"),
        *(head(b"Content-Length: " + value) for value in (b"", b"-1", b"+1", b"1,1", b"1_0", b"9" * 19, b"9" * 5000)),
        head(b"Content-Length : 1"),
        head(b"Content-Length: 1", b" folded"),
        head(b"Content-Length: 1", b"no colon"),
        head(b"Content-Length: 1", b"Content-Type: a\nX-Injected: b"),
        head(b"Content-Length: 1", b"Retry-After: 1\rX: b"),
        head(b"Content-Length: 1", b"Content-Type: \0"),
    ],
)
def test_refused(text: bytes) -> None:
    with pytest.raises(FramingError):
        parse_head(text)
