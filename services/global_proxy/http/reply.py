"""The answer to one request: given once, whole or as a stream."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from http import HTTPStatus

from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.engine_connection import EngineConnection
from services.global_proxy.http.framing import LAST_CHUNK, as_chunk, payloads

Header = tuple[bytes, bytes]

_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
_BODYLESS = frozenset({204, 304})  # nor do they have a length (RFC 9110, section 8.6)


class Reply:
    """Either `whole`, or `start`, any number of `take` and `event`, and `end`.

    Attributes:
        status: of the answer; None until it starts.
        complete: the answer's last byte has been written.
        closing: no other request is served on this connection.
        num_bytes: of payload and chunk framing written.
        on_client_gone: called when the client hangs up before the answer is complete.
    """

    def __init__(self, transport: asyncio.WriteTransport, request: ClientRequest, closing: bool) -> None:
        self.status: int | None = None
        self.complete = False
        self.closing = closing or not request.keep_alive or not request.takes_chunks
        self.num_bytes = 0
        self.on_client_gone: Callable[[], None] | None = None
        self.headers: list[Header] = []  # sent with whatever the answer turns out to be
        self._transport = transport
        self._takes_chunks = request.takes_chunks
        self._has_body = request.method != "HEAD"
        self._source: EngineConnection | None = None
        self._behind = False
        self._caught_up: asyncio.Future[None] | None = None
        self._passes_chunks = self._has_body and self._takes_chunks
        self._last_sent = b""  # of a stream

    def whole(self, status: int, content_type: bytes, body: bytes, headers: Sequence[Header] = ()) -> None:
        framing = b"" if status in _BODYLESS else b"content-length: %d\r\n" % len(body)
        message = self._head(status, content_type, headers, framing)
        if framing and self._has_body:
            self.num_bytes = len(body)
            message += body
        self.complete = True
        self._transport.write(message)

    def start(self, status: int, content_type: bytes, headers: Sequence[Header] = ()) -> None:
        """Begin a stream. To a client of HTTP/1.0 its end is the connection's."""
        framing = b"transfer-encoding: chunked\r\n" if self._takes_chunks else b""
        self._transport.write(self._head(status, content_type, headers, framing))

    def take(self, data: bytes, done: bool = False) -> None:
        """Pass on whole chunks, framing included; `done`: the last chunk is among them."""
        self.num_bytes += len(data)
        self.complete = done
        if self._passes_chunks:
            self._transport.write(data)
            self._last_sent = data
        elif self._has_body:
            for payload in payloads(data):
                self._transport.write(payload)
                self._last_sent = payload

    def event(self, event: bytes) -> None:
        """One server-sent event of ours, after the end of the last one."""
        at_event_end = not self._last_sent or self._last_sent.removesuffix(b"\r\n").endswith(b"\n\n")
        self.take(as_chunk(event if at_event_end else b"\n\n" + event))

    def end(self) -> None:
        if not self.complete:
            self.complete = True
            if self._takes_chunks and self._has_body:
                self._transport.write(LAST_CHUNK)

    # Backpressure and the client's end: called by the connection.

    def fed_by(self, source: EngineConnection | None) -> None:
        """Whom to pause while the client is behind."""
        self._source = source
        if source is not None and self._behind:
            source.pause()

    def pause(self) -> None:
        self._behind = True
        if self._source is not None:
            self._source.pause()

    def resume(self) -> None:
        self._behind = False
        if self._source is not None:
            self._source.resume()
        if self._caught_up is not None and not self._caught_up.done():
            self._caught_up.set_result(None)

    async def writable(self) -> None:
        """Until the client is no longer behind; for streams that have no source to pause."""
        if self._behind:
            self._caught_up = asyncio.get_running_loop().create_future()
            await self._caught_up

    def _head(self, status: int, content_type: bytes, headers: Iterable[Header], framing: bytes) -> bytes:
        assert self.status is None, "a request is answered once"
        self.status = status
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, b"content-type: ", content_type, b"\r\n"]
        lines += (framing, _date.line())
        for name, value in self.headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"connection: close\r\n\r\n" if self.closing else b"\r\n")
        return b"".join(lines)


class _Date:
    """The Date header, written anew each second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


_date = _Date()
