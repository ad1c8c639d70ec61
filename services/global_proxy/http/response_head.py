"""The status line and headers of an engine's answer."""

import re
from dataclasses import dataclass
from functools import lru_cache

from services.global_proxy.http.framing import ChunkedFraming, FramingError, LengthFraming

MAX_HEAD_BYTES = 64 * 1024

Framing = ChunkedFraming | LengthFraming

_BODYLESS = frozenset({204, 304})
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*)?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What of an answer's head matters to the proxy; the other headers are between the engine and the proxy.

    Attributes:
        num_bytes: of the body; None: it is chunked.
    """

    status: int
    content_type: bytes
    retry_after: bytes | None
    keep_alive: bool
    num_bytes: int | None

    @property
    def is_stream(self) -> bool:
        """Server-sent events, each passed on as it comes."""
        return self.num_bytes is None and self.content_type.startswith(b"text/event-stream")

    def framing(self) -> Framing:
        """For one body. Raises FramingError: it is too long."""
        return ChunkedFraming() if self.num_bytes is None else LengthFraming(self.num_bytes)


@lru_cache(maxsize=64)  # under load many heads are alike for a second, until their date changes
def parse_head(head: bytes) -> ResponseHead:
    """Read `head`, without the empty line that ends it.

    Raises:
        FramingError: it is not HTTP/1.x, or says nothing, or two things, about where the body ends.
    """
    status_line, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        raise FramingError(f"not an HTTP answer: {status_line[:40]!r}")
    status = int(match[2])
    content_type, retry_after, length, chunked = b"application/octet-stream", None, None, False
    keep_alive = match[1] == b"1"
    for line in lines:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise FramingError(f"not a header: {line[:40]!r}")
        value = header[2]
        match header[1].lower():
            case b"content-type":
                content_type = value
            case b"content-length":
                length = _length(value, length)
            case b"transfer-encoding":
                chunked = _is_chunked(value, chunked)
            case b"retry-after":
                retry_after = value
            case b"connection":
                keep_alive = keep_alive and b"close" not in value.lower()
    return ResponseHead(status, content_type, retry_after, keep_alive, _num_bytes(status, length, chunked))


def _num_bytes(status: int, length: int | None, chunked: bool) -> int | None:
    if status == 101:
        raise FramingError("another protocol, which nobody asked for")
    if chunked and length is not None:
        raise FramingError("both Content-Length and Transfer-Encoding")
    if status < 200 or status in _BODYLESS:
        return 0
    if length is None and not chunked:
        raise FramingError("neither Content-Length nor Transfer-Encoding")
    return length


def _length(value: bytes, before: int | None) -> int:
    if before is not None or _LENGTH.fullmatch(value) is None:
        raise FramingError(f"not one Content-Length: {value[:20]!r}")
    return int(value)


def _is_chunked(value: bytes, before: bool) -> bool:
    if before or value.lower() != b"chunked":
        raise FramingError(f"not one Transfer-Encoding that is known: {value[:20]!r}")
    return True
