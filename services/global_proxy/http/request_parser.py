"""Requests out of a client's bytes, within bounds.

Parsing is llhttp's (httptools), in its strict mode. What it leaves to others is checked here: one Host, the sizes of
heads and bodies, versions, and trailers, which are read past.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import httptools

from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.client_request import ClientRequest

Phase = Literal["idle", "head", "body"]

_ONCE = frozenset({b"host", b"content-length", b"content-type", b"authorization"})
_READ_PAST_BYTES = 64 * 1024  # of the body of a request that is turned away, to keep its connection
_RETRY_AFTER_S = 1


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    max_head_bytes: int = 64 * 1024
    max_headers: int = 100
    max_body_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True)
class Refusal:
    """Why a request is not served, and its connection closed."""

    status: int
    kind: str
    message: str
    retry_after_s: int | None = None
    reason: str = "invalid"  # as it is counted


class RequestParser:
    """Args:
    at_door: shown each request when its head is complete. May turn it away: its body is not kept then, and only a small
        one is read past.
    bodies: counts the bodies' bytes. Whoever takes a request from `ready` calls `forget` when it has been answered.

    Attributes:
        ready: whole requests, for the caller to take, and such as are turned away.
        refusal: why nothing is read any more. What is in `ready` came before and is not concerned.
        ended: nothing is read any more, for the last one in `ready` is turned away, and what follows is its body.
        request: being received, or the last one.
        phase: what comes next: a new request, the rest of a head, the rest of a body.
    """

    def __init__(
        self,
        limits: RequestLimits,
        client: str = "",
        at_door: Callable[[ClientRequest], None] | None = None,
        bodies: BodyBudget | None = None,
    ) -> None:
        self.ready: deque[ClientRequest] = deque()
        self.refusal: Refusal | None = None
        self.ended = False
        self.request = ClientRequest()
        self.phase: Phase = "idle"
        self._limits = limits
        self._client = client
        self._at_door = at_door
        self._bodies = bodies or BodyBudget(sys.maxsize)
        self._max_body_bytes = limits.max_body_bytes  # of the present request
        self._llhttp = httptools.HttpRequestParser(self)
        self._headers = self.request.headers
        self._num_repeats = 0
        self._num_fed_bytes = 0  # in the present call
        self._num_bare_bytes = 0  # since a head was complete, or a body grew

    @property
    def awaits_continue(self) -> bool:
        """The client sends its body when it is told to go on (RFC 9110, section 10.1.1)."""
        if self.phase != "body" or self.ended or self.request.body or not self.request.takes_chunks:
            return False
        return self.request.headers.get(b"expect", b"").lower() == b"100-continue"

    def feed(self, data: bytes | memoryview) -> None:
        """Give it a few kilobytes at most: what they hold is parsed to the end. Nothing after a refusal or an end."""
        assert self.refusal is None and not self.ended, "nothing is read any more"  # noqa: PT018
        self._num_fed_bytes = len(data)
        self._num_bare_bytes += len(data)
        try:
            self._llhttp.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self.ready and self.ready[-1] is self.request and not self.ended:
                self.ready.pop()  # it has no body
            self._refuse(400, "BadRequestError", "Upgrading the connection is not supported")
        except httptools.HttpParserError as error:
            self._refuse(400, "BadRequestError", f"Not valid HTTP: {error}")
        if self._num_bare_bytes > self._limits.max_head_bytes and not self.ready:
            self._refuse_head()

    def forget(self, request: ClientRequest) -> None:
        """Its body is no longer held."""
        self._bodies.num_bytes -= request.num_body_bytes
        request.num_body_bytes = 0
        request.body = bytearray()

    def forget_all(self) -> None:
        """The connection has ended: nobody will take what is left."""
        for request in self.ready:
            self.forget(request)
        self.ready.clear()
        if self.phase == "body":
            self.forget(self.request)

    # llhttp's callbacks. One that raises would only be wrapped: they note what is wrong.

    def on_message_begin(self) -> None:
        self.request = request = ClientRequest(client=self._client)
        self._headers = request.headers
        self._num_repeats = 0
        self._num_bare_bytes = self._num_fed_bytes
        self.phase = "head"

    def on_url(self, url: bytes) -> None:
        self.request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        name = name.lower()
        if name in headers:
            self._num_repeats += 1
            if name in _ONCE:
                self._refuse(400, "BadRequestError", f"More than one {name.decode()} header")
            if self._num_repeats > self._limits.max_headers:
                return  # to join any number of values would take quadratic time
            value = headers[name] + b", " + value
        headers[name] = value

    def on_headers_complete(self) -> None:
        request, llhttp = self.request, self._llhttp
        self._headers = {}  # trailers must not pass for headers, which have been looked at
        self.phase = "body"
        request.method = llhttp.get_method().decode("latin-1")
        request.keep_alive = llhttp.should_keep_alive()
        self._look_at(request, llhttp.get_http_version())
        self._num_bare_bytes = 0
        if self.refusal is None and not self.ended:
            self._admit(request)

    def on_body(self, body: bytes) -> None:
        self._num_bare_bytes = 0
        request, bodies = self.request, self._bodies
        if request.turned_away is not None or self.ended:
            return
        received = request.body
        received += body
        request.num_body_bytes += len(body)
        bodies.num_bytes += len(body)
        if len(received) > self._max_body_bytes:
            self._refuse_body(self._max_body_bytes)
            self.forget(request)
        elif bodies.num_bytes > bodies.max_bytes:
            self._refuse_for_now()
            self.forget(request)

    def on_message_complete(self) -> None:
        self.phase = "idle"
        if self.refusal is not None or self.ended:
            self.forget(self.request)
        else:
            self.ready.append(self.request)

    # Admitting and refusing

    def _admit(self, request: ClientRequest) -> None:
        """Its head is good: may its body come?"""
        num_bytes = int(request.headers.get(b"content-length", b"0"))
        if self._at_door is not None:
            self._at_door(request)
            if request.turned_away is not None:
                self._turn_away(request, num_bytes)
                return
            if request.entry is not None:
                most_bytes = request.entry[0].max_body_bytes
                self._max_body_bytes = self._limits.max_body_bytes if most_bytes is None else most_bytes
        if num_bytes > self._max_body_bytes:
            self._refuse_body(self._max_body_bytes)
        elif self._bodies.num_bytes + num_bytes > self._bodies.max_bytes:
            self._refuse_for_now()

    def _turn_away(self, request: ClientRequest, num_bytes: int) -> None:
        """Read past its body if that is small and comes unasked; else it is answered now, and the connection ends."""
        headers = request.headers
        if num_bytes > _READ_PAST_BYTES or b"transfer-encoding" in headers or b"expect" in headers:
            request.keep_alive = False
            self.ready.append(request)
            self.ended = True

    def _look_at(self, request: ClientRequest, version: str) -> None:
        headers, limits = request.headers, self._limits
        if version != "1.1":
            request.takes_chunks = False
            if version != "1.0":
                self._refuse(505, "BadRequestError", "Only HTTP/1.1 and HTTP/1.0 are supported")
            if b"transfer-encoding" in headers:  # whoever passed this on may have taken it for no body
                self._refuse(400, "BadRequestError", "HTTP/1.0 has no Transfer-Encoding")
        elif b"host" not in headers:
            self._refuse(400, "BadRequestError", "No Host header")
        if len(headers) + self._num_repeats > limits.max_headers:
            self._refuse(431, "RequestTooLargeError", f"More than {limits.max_headers} headers")
        if self._num_bare_bytes > limits.max_head_bytes and _num_head_bytes(request) > limits.max_head_bytes:
            self._refuse_head()
        if b"transfer-encoding" in headers and headers[b"transfer-encoding"].strip().lower() != b"chunked":
            self._refuse(400, "BadRequestError", "The only Transfer-Encoding supported is chunked")

    def _refuse_head(self) -> None:
        message = f"The headers are larger than {self._limits.max_head_bytes} bytes"
        self._refuse(431, "RequestTooLargeError", message)

    def _refuse_body(self, max_bytes: int) -> None:
        self._refuse(413, "RequestTooLargeError", f"The request body is larger than {max_bytes} bytes")

    def _refuse_for_now(self) -> None:
        message = "The proxy holds as many request bodies as it may: send the request again"
        self._refuse(503, "ServiceUnavailableError", message, _RETRY_AFTER_S, "overloaded")

    def _refuse(
        self, status: int, kind: str, message: str, retry_after_s: int | None = None, reason: str = "invalid"
    ) -> None:
        if self.refusal is None and not self.ended:
            self.refusal = Refusal(status, kind, message, retry_after_s, reason)


def _num_head_bytes(request: ClientRequest) -> int:
    return len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers.items())
