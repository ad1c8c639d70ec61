"""One client's connection: requests read within bounds, served one after the other."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from services.global_proxy import openai_error
from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from services.global_proxy.http.request_parser import Phase, Refusal, RequestLimits, RequestParser

Serve = Callable[[ClientRequest, Reply], Awaitable[None]]

_FEED_BYTES = 16 * 1024  # parsed at once: what is pipelined beyond the first requests waits as bytes, not as objects
_MAX_PIPELINED_BYTES = 64 * 1024  # received while a request is being served; then no more is read
_LINGER_S = 1.0  # for the client to read why it was refused, before its unread bytes reset the connection


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits(RequestLimits):
    head_timeout_s: float = 15.0  # from a request's first byte to the end of its headers
    body_timeout_s: float = 30.0  # from there to its last byte
    idle_timeout_s: float = 75.0  # between requests: longer than what load balancers keep idle connections for
    reader_timeout_s: float = 30.0  # for a client that is behind with reading its answer


class ClientConnection(asyncio.Protocol):
    """Args:
    serve: answers one request; never cancelled from here: it is told when the client goes.
    connections: holds every open connection of the server.
    on_refused: told of a request that is refused here, so that `serve` never sees it.
    at_door, bodies: see RequestParser. What is turned away at the door is for `serve` to answer.

    Attributes:
        on_lost: called when the connection has ended.
    """

    def __init__(
        self,
        serve: Serve,
        limits: ConnectionLimits,
        connections: "set[ClientConnection]",
        on_refused: Callable[[Refusal], None] = lambda refusal: None,
        at_door: Callable[[ClientRequest], None] | None = None,
        bodies: BodyBudget | None = None,
    ) -> None:
        self.on_lost: Callable[[], None] = lambda: None
        self._serve = serve
        self._limits = limits
        self._connections = connections
        self._on_refused = on_refused
        self._at_door = at_door
        self._bodies = bodies
        self._patience_s = {"idle": limits.idle_timeout_s, "head": limits.head_timeout_s, "body": limits.body_timeout_s}
        self._loop = asyncio.get_running_loop()
        self._unparsed = bytearray()
        self._reading = True
        self._behind = False  # the client, with reading
        self._reply: Reply | None = None  # of the request being served
        self._task: asyncio.Task[None] | None = None
        self._waiting_for: Phase | None = None  # None: for our own answer
        self._deadline_s = 0.0
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._closing = False

    def drain(self) -> None:
        """Serve no request after the present one."""
        self._draining = True
        if self._reply is None:
            self._close()
        else:
            self._reply.closing = True  # unless its head has been sent; then it is closed unasked

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        client = peer[0] if isinstance(peer, tuple) else ""
        self._parser = RequestParser(self._limits, client, self._at_door, self._bodies)
        self._connections.add(self)
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._closing = True
        self._parser.forget_all()
        for timer in (self._deadline_timer, self._abort_timer):
            if timer is not None:
                timer.cancel()
        reply = self._reply
        if reply is not None:
            reply.resume()
            if not reply.complete and reply.on_client_gone is not None:
                reply.on_client_gone()
        self.on_lost()

    def eof_received(self) -> bool:
        """A client that has shut down its sending half is gone: no HTTP client in use does so and goes on reading."""
        if self._reply is not None and not self._reply.complete:
            self.abort()
        else:
            self._close()
        return False

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._reply is None and not self._behind:
            self._receive(data)
            return
        self._unparsed += data
        if len(self._unparsed) > _MAX_PIPELINED_BYTES and self._reading:
            self._reading = False
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._behind = True
        self._abort_in(self._limits.reader_timeout_s)
        if self._reply is not None:
            self._reply.pause()

    def resume_writing(self) -> None:
        self._behind = False
        if self._closing:
            return
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        if self._reply is not None:
            self._reply.resume()
        else:
            self._go_on()

    # One request after the other

    def _receive(self, data: bytes) -> None:
        parser = self._parser
        if len(data) <= _FEED_BYTES:
            parser.feed(data)
        else:
            rest = memoryview(data)
            while rest and not parser.ready and parser.refusal is None:
                parser.feed(rest[:_FEED_BYTES])
                rest = rest[_FEED_BYTES:]
            self._unparsed += rest
        self._go_on()

    def _go_on(self) -> None:
        """Serve the next request, or see to it that one comes."""
        parser = self._parser
        if self._behind:
            return  # who does not read answers gets no more of them; `resume_writing` comes back here
        if parser.ready:
            request = parser.ready.popleft()
            self._waiting_for = None
            self._reply = Reply(self._transport, request, closing=self._draining)
            self._task = self._loop.create_task(self._answer(request, self._reply))
        elif parser.refusal is not None:
            self._refuse(parser.refusal)
        else:
            self._read_on()
            if self._unparsed:
                data = bytes(self._unparsed)
                self._unparsed.clear()
                self._receive(data)
            else:
                self._wait()

    async def _answer(self, request: ClientRequest, reply: Reply) -> None:
        try:
            await self._serve(request, reply)
        finally:
            self._answered(request, reply)

    def _answered(self, request: ClientRequest, reply: Reply) -> None:
        self._reply = None
        self._parser.forget(request)
        if self._closing:
            return
        if not reply.complete:
            self.abort()  # too short for its framing, so that the client sees it
        elif not reply.closing and not self._draining:
            self._go_on()
        elif self._parser.ended:
            self._hang_up()
        else:
            self._close()

    def _refuse(self, refusal: Refusal) -> None:
        body = openai_error.error_json(refusal.message, refusal.kind, refusal.status)
        reply = Reply(self._transport, self._parser.request, closing=True)
        retry_after = [] if refusal.retry_after_s is None else [(b"retry-after", b"%d" % refusal.retry_after_s)]
        reply.headers.append((b"x-request-id", secrets.token_hex(16).encode()))
        reply.whole(refusal.status, b"application/json", body, retry_after)
        self._on_refused(refusal)
        self._hang_up()

    def _hang_up(self) -> None:
        """Read on, and keep nothing: the client's unread bytes would reset the connection before it reads why."""
        self._unparsed.clear()
        self._read_on()
        self._closing = True
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
        self._abort_in(_LINGER_S)

    def _close(self) -> None:
        """Hang up once what was written has been sent, or the client's time to read it is over."""
        if not self._closing:
            self._abort_in(self._limits.reader_timeout_s)
        self._closing = True
        self._transport.close()

    def _read_on(self) -> None:
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    # Patience

    def _wait(self) -> None:
        """For a request, or more of one. Each phase has its time, however many pieces it comes in."""
        phase = self._parser.phase
        if phase == self._waiting_for:
            return
        self._waiting_for = phase
        self._deadline_s = deadline_s = self._loop.time() + self._patience_s[phase]
        timer = self._deadline_timer
        if timer is None or timer.when() > deadline_s:  # one request after the other costs no timers
            if timer is not None:
                timer.cancel()
            self._deadline_timer = self._loop.call_at(deadline_s, self._look_at_the_clock)
        if self._parser.awaits_continue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _look_at_the_clock(self) -> None:
        self._deadline_timer = None
        waiting_for = self._waiting_for
        if waiting_for is None or self._closing:
            return
        if self._deadline_s > self._loop.time():
            self._deadline_timer = self._loop.call_at(self._deadline_s, self._look_at_the_clock)
        elif waiting_for == "idle":
            self._close()
        else:
            what = "headers" if waiting_for == "head" else "body"
            self._refuse(Refusal(408, "RequestTimeoutError", f"The request {what} did not arrive in time"))

    def _abort_in(self, seconds: float) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self._abort_timer = self._loop.call_later(seconds, self.abort)
