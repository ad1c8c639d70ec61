"""ASGI applications on our own connections."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from services.global_proxy.http.asgi import serve_asgi
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from tests.services.global_proxy.http.fake_transport import FakeTransport


async def answer(app: Any, **of_request: Any) -> tuple[bytes, bytes]:
    transport, request = FakeTransport(), ClientRequest(method="POST", **of_request)
    async with asyncio.timeout(20):
        await serve_asgi(app, request, Reply(transport, request, closing=False))
    head, _, body = transport.taken().partition(b"\r\n\r\n")
    return head, body


async def test_the_request_as_the_application_sees_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        seen = [request.method, request.url.path, request.query_params["q"], (await request.body()).decode()]
        await JSONResponse([*seen, request.headers["x-a"]], headers={"x-b": "1"})(scope, receive, send)

    request = {"target": b"/admin/v1/a%3A1?q=2", "headers": {b"x-a": b"3"}, "body": bytearray(b"{}")}
    head, body = await answer(app, **request)
    assert body == b'["POST","/admin/v1/a:1","2","{}","3"]'
    assert b"\r\nx-b: 1" in head
    assert head.count(b"content-length") == head.count(b"content-type") == 1


async def test_hop_by_hop_headers_do_not_pass() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = {"Connection": "keep-alive", "Keep-Alive": "5", "Transfer-Encoding": "gzip", "Date": "now"}
        await Response("x", headers=headers)(scope, receive, send)

    head, _ = await answer(app)
    for name in (b"connection", b"keep-alive", b"transfer-encoding", b"now"):
        assert name not in head.lower()


async def test_a_stream() -> None:
    async def pieces() -> Any:
        for piece in (b"one", b"", b"two"):
            yield piece

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(pieces())(scope, receive, send)

    head, body = await answer(app)
    assert b"transfer-encoding: chunked" in head
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


async def test_the_application_is_told_that_the_client_left() -> None:
    transport, request = FakeTransport(), ClientRequest()
    reply = Reply(transport, request, closing=False)
    told = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        told.append(await receive())

    serving = asyncio.create_task(serve_asgi(app, request, reply))
    await asyncio.sleep(0)
    assert reply.on_client_gone is not None
    reply.on_client_gone()
    async with asyncio.timeout(20):
        await serving
    assert told == [{"type": "http.disconnect"}]
