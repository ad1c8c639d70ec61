"""One connection to an engine: requests one after the other, each answer read whole or relayed as it comes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from services.global_proxy.http.framing import ChunkedFraming, FramingError, LengthFraming, is_one_chunk
from services.global_proxy.http.response_head import MAX_HEAD_BYTES, ResponseHead, parse_head

_MAX_HELD_BYTES = 256 * 1024  # of a stream that nobody takes yet


class BrokenOffError(ConnectionError):
    """The engine closed the connection, or sent what is no HTTP, before its answer's end.

    Attributes:
        unseen: the request was not sent; or nothing of an answer had come, on a connection that had served before:
            the engine may have closed it just then.
    """

    def __init__(self, message: str, unseen: bool = False) -> None:
        super().__init__(message)
        self.unseen = unseen


@dataclass(slots=True)
class EngineAnswer:
    """A whole answer, or the beginning of a stream, whose bytes its connection then gives to a sink.

    Attributes:
        body: the payload; of a stream what has come of it, framing included, which is relayed too.
    """

    head: ResponseHead
    body: bytes = b""


class Sink(Protocol):
    """Takes a stream's bytes, chunk framing included, always up to the end of a chunk.

    `done`: the last chunk is among them.
    """

    def take(self, data: bytes, done: bool) -> None: ...


class EngineConnection(asyncio.Protocol):
    """Made by `loop.create_connection`; one request at a time."""

    def __init__(self, on_closed: Callable[["EngineConnection"], None]) -> None:
        self.closed = False
        self.idle_since_s = 0.0  # on the monotonic clock; kept by whoever keeps idle connections
        self._loop = asyncio.get_running_loop()  # kept: asking is a system call in Python 3.11
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._num_served = 0
        self._held = False  # as much has been received of a stream as is kept for a taker
        self._taker_behind = False
        self._paused = False  # for either reason
        self._buffer = bytearray()  # received and not yet passed on
        self._head: ResponseHead | None = None
        self._framing: ChunkedFraming | LengthFraming | None = None
        self._answer: asyncio.Future[EngineAnswer] | None = None
        self._take: Callable[[bytes, bool], None] | None = None  # the sink's, up to the stream's end
        self._relayed: asyncio.Future[None] | None = None

    # For whoever has a request.

    def send(self, request: bytes) -> asyncio.Future[EngineAnswer]:
        """Send a whole request.

        Returns:
            Its answer: when all of it is there; of a stream, when its first byte is. Fails with BrokenOffError.
        """
        assert self._answer is None, "one request at a time"
        self._answer = self._loop.create_future()
        if self.closed:
            self._answer.set_exception(BrokenOffError("the connection is closed", unseen=True))
        else:
            cast(asyncio.Transport, self._transport).write(request)
        return self._answer

    def relay_to(self, sink: Sink) -> asyncio.Future[None]:
        """Give the stream to `sink`, from its first byte to its last. Fails with BrokenOffError."""
        assert self._relayed is None, "a stream has one taker"
        self._take = sink.take
        self._relayed = self._loop.create_future()
        if self._buffer:
            self.data_received(b"")
        self._held = False
        self._steer()
        if self.closed:
            self._fail("the engine closed the connection")
        return self._relayed

    def pause(self) -> None:
        """Read no more for now: the stream's taker is behind."""
        self._taker_behind = True
        self._steer()

    def resume(self) -> None:
        self._taker_behind = False
        self._steer()

    def make_ready(self) -> bool:
        """Forget the last answer; False if the connection is not good for another one."""
        done = self._relayed or self._answer
        succeeded = done is not None and done.done() and not done.cancelled() and done.exception() is None
        if self.closed or not succeeded or self._buffer or not cast(ResponseHead, self._head).keep_alive:
            return False  # of a stream that nobody took there is something in the buffer
        self._head = self._framing = self._answer = self._take = self._relayed = None
        self._num_served += 1
        self.resume()  # the last stream's taker may have been behind
        return True

    def abort(self) -> None:
        """Close at once: the engine aborts what it was doing for this request. No sink gets anything any more."""
        self.closed = True
        self._take = None
        if self._transport is not None:
            self._transport.abort()

    # For the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        try:
            if self._take is not None and not buffer and is_one_chunk(data):
                self._take(data, False)
            elif self._relayed is None:
                buffer += data
                self._read()
            elif not buffer:
                self._pass_on(data)
            else:
                buffer += data
                if len(buffer) >= cast(ChunkedFraming, self._framing).num_needed:
                    data = bytes(buffer)
                    buffer.clear()
                    self._pass_on(data)
        except FramingError as error:
            self._fail(str(error))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._fail(f"the engine closed the connection{f' ({error})' if error else ''}")
        self._on_closed(self)

    def _read(self) -> None:
        """Answer the request once enough has come."""
        if self._answer is None:
            raise FramingError("an answer to no request")
        if self._head is None and not self._read_head():
            return
        head = cast(ResponseHead, self._head)
        if self._answer.done():
            if len(self._buffer) > _MAX_HELD_BYTES:  # a stream that nobody takes yet, or nobody will
                self._held = True
                self._steer()
        elif head.is_stream:
            if self._buffer:
                self._answer.set_result(EngineAnswer(head, bytes(self._buffer)))
        elif (body := cast(ChunkedFraming | LengthFraming, self._framing).take_all(self._buffer)) is not None:
            self._answer.set_result(EngineAnswer(head, body))

    def _read_head(self) -> bool:
        buffer = self._buffer
        while 0 <= (end := buffer.find(b"\r\n\r\n")) <= MAX_HEAD_BYTES:
            head = parse_head(bytes(buffer[:end]))
            del buffer[: end + 4]
            if head.status >= 200:  # 100 Continue and its like come before the answer
                self._head = head
                self._framing = head.framing()
                return True
        if len(buffer) > MAX_HEAD_BYTES:
            raise FramingError("an endless head")
        return False

    def _pass_on(self, data: bytes) -> None:
        """Give the sink the whole chunks: were the engine to die now, what follows would not land inside of one."""
        framing, take, relayed = self._framing, self._take, self._relayed
        assert isinstance(framing, ChunkedFraming), "a stream"
        if take is None or relayed is None:
            raise FramingError("bytes after the last chunk")
        num_whole = framing.whole_chunks(data)
        if num_whole == len(data):
            take(data, framing.done)
        else:
            self._buffer += data[num_whole:]
            if num_whole:
                take(data[:num_whole], False)
        if framing.done:
            self._take = None
            if not relayed.done():
                relayed.set_result(None)

    def _steer(self) -> None:
        paused = self._held or self._taker_behind
        if paused == self._paused or self.closed:
            return
        self._paused = paused
        transport = cast(asyncio.Transport, self._transport)
        if paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _fail(self, message: str) -> None:
        if self._relayed is not None:
            if not self._relayed.done():
                self._relayed.set_exception(BrokenOffError(message))
        elif self._answer is not None and not self._answer.done():
            unseen = self._num_served > 0 and self._head is None and not self._buffer
            self._answer.set_exception(BrokenOffError(message, unseen))
