"""Serving a request by an ASGI application: for every route that is not the hot one."""

import asyncio
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp

from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.framing import as_chunk
from services.global_proxy.http.reply import Reply

_OURS = frozenset({b"content-type", b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"date"})


async def serve_asgi(app: ASGIApp, request: ClientRequest, reply: Reply) -> None:
    """Have `app` answer. A client that leaves is told to it as `http.disconnect`."""
    await _Call(request, reply).run(app)


class _Call:
    def __init__(self, request: ClientRequest, reply: Reply) -> None:
        self._request = request
        self._reply = reply
        self._body_given = False
        self._gone = asyncio.Event()
        self._start: dict[str, Any] = {}

    async def run(self, app: ASGIApp) -> None:
        request = self._request
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1" if request.takes_chunks else "1.0",
            "method": request.method,
            "scheme": "http",
            "path": unquote(request.path),
            "raw_path": request.target.partition(b"?")[0],
            "query_string": request.query,
            "root_path": "",
            "headers": list(request.headers.items()),
            "client": (request.client, 0),
            "server": None,
            "state": {},
        }
        self._reply.on_client_gone = self._gone.set
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": bytes(self._request.body), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        reply = self._reply
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if reply.status is None:
            headers = {name.lower(): value for name, value in self._start["headers"]}
            others = [(name, value) for name, value in headers.items() if name not in _OURS]
            content_type = headers.get(b"content-type", b"application/octet-stream")
            if not more:
                reply.whole(self._start["status"], content_type, body, others)
                return
            reply.start(self._start["status"], content_type, others)
        if body:
            reply.take(as_chunk(body))
            await reply.writable()
        if not more:
            reply.end()
