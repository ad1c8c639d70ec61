"""The client's side of a request: reading its body, and answering once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from services.global_proxy import openai_error
from services.global_proxy.errors import BodyTimeoutError, BodyTooLargeError, ClientGoneError, ProxyError
from services.global_proxy.request_scope import Receive

Send = Callable[[Any], Awaitable[None]]
Header = tuple[bytes, bytes]

_LAST_WORDS_S = 1.0  # for an error event to a client that may have stopped reading


async def read_body(receive: Receive, content_length: bytes | None, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole request body.

    Raises:
        BodyTooLargeError: more than `limit_bytes`, announced or sent.
        BodyTimeoutError: not all there after `timeout_s`.
        ClientGoneError: the client hung up first.
    """
    too_large = BodyTooLargeError(f"The request body is larger than {limit_bytes} bytes")
    if content_length is not None and int(content_length) > limit_bytes:
        raise too_large
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                pieces.append(message["body"])
                num_bytes += len(message["body"])
                if num_bytes > limit_bytes:
                    raise too_large
                if not message["more_body"]:
                    return b"".join(pieces)
    except TimeoutError:
        raise BodyTimeoutError(f"The request body did not arrive within {timeout_s:g} s") from None


class Reply:
    """One answer: either `whole`, or `start`, any number of `chunk`s and `end`.

    Attributes:
        status: of the answer; None until it starts.
        complete: the answer's last byte is on its way to the server.
    """

    def __init__(self, send: Send, headers: Iterable[Header]) -> None:
        self._headers = list(headers)  # sent with whatever the answer turns out to be
        self.status: int | None = None
        self.complete = False
        self._send = send
        self._streaming = False
        self._at_event_end = True  # the last chunk closed its server-sent event

    async def whole(self, status: int, content_type: bytes, body: bytes, headers: Iterable[Header] = ()) -> None:
        await self._start(status, content_type, [(b"content-length", b"%d" % len(body)), *headers])
        self.complete = True
        await self._send({"type": "http.response.body", "body": body})

    async def start(self, status: int, content_type: bytes, headers: Iterable[Header] = ()) -> None:
        self._streaming = True
        await self._start(status, content_type, headers)

    async def _start(self, status: int, content_type: bytes, headers: Iterable[Header]) -> None:
        self.status = status
        all_headers = [(b"content-type", content_type), *self._headers, *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def chunk(self, data: bytes) -> None:
        self._at_event_end = data.endswith(b"\n\n")
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        self.complete = True
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: ProxyError) -> None:
        """Say what went wrong: with a status if there is still time for one, else as the stream's last event."""
        if self.status is None:
            retry = [] if error.retry_after_s is None else [(b"retry-after", b"%d" % error.retry_after_s)]
            await self.whole(error.status, b"application/json", openai_error.to_json(error), retry)
            return
        if not self._streaming:
            return  # a whole answer broken off: too short for its content-length, so the client sees it
        event = openai_error.to_event(error)
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.chunk(event if self._at_event_end else b"\n\n" + event)
                await self.end()
        except TimeoutError:
            pass  # the client reads nothing; the server closes its connection
