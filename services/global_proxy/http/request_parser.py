"""Requests out of a client's bytes, within bounds.

Parsing is llhttp's (httptools), in its strict mode. What it leaves to others is checked here: one Host, the sizes of
heads and bodies, versions, and trailers, which are read past.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import httptools

from services.global_proxy.http.client_request import ClientRequest

Phase = Literal["idle", "head", "body"]

_ONCE = frozenset({b"host", b"content-length", b"content-type", b"authorization"})


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


class RequestParser:
    """Attributes:
    ready: whole requests, for the caller to take.
    refusal: why nothing is read any more. What is in `ready` came before and is not concerned.
    request: being received, or the last one.
    phase: what comes next: a new request, the rest of a head, the rest of a body.
    """

    def __init__(self, limits: RequestLimits, client: str = "") -> None:
        self.ready: deque[ClientRequest] = deque()
        self.refusal: Refusal | None = None
        self.request = ClientRequest()
        self.phase: Phase = "idle"
        self._limits = limits
        self._client = client
        self._llhttp = httptools.HttpRequestParser(self)
        self._headers = self.request.headers
        self._num_repeats = 0
        self._num_fed_bytes = 0  # in the present call
        self._num_bare_bytes = 0  # since a head was complete, or a body grew

    @property
    def awaits_continue(self) -> bool:
        """The client sends its body when it is told to go on (RFC 9110, section 10.1.1)."""
        if self.phase != "body" or self.request.body or not self.request.takes_chunks:
            return False
        return self.request.headers.get(b"expect", b"").lower() == b"100-continue"

    def feed(self, data: bytes | memoryview) -> None:
        """Give it a few kilobytes at most: what they hold is parsed to the end. Nothing, once there is a refusal."""
        assert self.refusal is None, "nothing is read any more"
        self._num_fed_bytes = len(data)
        self._num_bare_bytes += len(data)
        try:
            self._llhttp.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self.ready and self.ready[-1] is self.request:
                self.ready.pop()
            self._refuse(400, "BadRequestError", "Upgrading the connection is not supported")
        except httptools.HttpParserError as error:
            self._refuse(400, "BadRequestError", f"Not valid HTTP: {error}")
        if self._num_bare_bytes > self._limits.max_head_bytes and not self.ready:
            self._refuse_head()

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

    def on_body(self, body: bytes) -> None:
        self._num_bare_bytes = 0
        received = self.request.body
        received += body
        if len(received) > self._limits.max_body_bytes:
            self._refuse_body()
            received.clear()

    def on_message_complete(self) -> None:
        self.phase = "idle"
        if self.refusal is None:
            self.ready.append(self.request)

    # Refusing

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
        if b"transfer-encoding" in headers:
            if headers[b"transfer-encoding"].strip().lower() != b"chunked":
                self._refuse(400, "BadRequestError", "The only Transfer-Encoding supported is chunked")
        elif int(headers.get(b"content-length", b"0")) > limits.max_body_bytes:
            self._refuse_body()

    def _refuse_head(self) -> None:
        message = f"The headers are larger than {self._limits.max_head_bytes} bytes"
        self._refuse(431, "RequestTooLargeError", message)

    def _refuse_body(self) -> None:
        message = f"The request body is larger than {self._limits.max_body_bytes} bytes"
        self._refuse(413, "RequestTooLargeError", message)

    def _refuse(self, status: int, kind: str, message: str) -> None:
        self.refusal = self.refusal or Refusal(status, kind, message)


def _num_head_bytes(request: ClientRequest) -> int:
    return len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers.items())
