"""Raw clients of a real proxy with engines, most of them hostile."""

import asyncio
import json
import re
import socket
from pathlib import Path

import pytest

from services.global_proxy.http.framing import as_chunk
from services.global_proxy.security.api_keys import new_key
from tests.services.global_proxy.conftest import Deploy, Deployment, Logged, until
from tests.services.global_proxy.http.raw_client import HEAD, LIVE, completion, rest, statuses


async def exchange(pd: Deployment, data: bytes) -> bytes:
    """The answer of a proxy that then hangs up."""
    reader, writer = await pd.raw(data)
    answer = await rest(reader)
    writer.close()
    return answer


SMUGGLED = completion(prompt="smuggled")


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n" % (5 + len(SMUGGLED)) + SMUGGLED,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        HEAD + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        HEAD + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
        HEAD + b"host: y\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n" + SMUGGLED,
        HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    ],
)
async def test_smuggling(pd: Deployment, data: bytes) -> None:
    answer = await exchange(pd, data)
    assert statuses(answer) == [400]
    assert b"\r\nconnection: close\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "BadRequestError"
    assert all(engine.received == [] for engine in pd.engines)


async def test_no_header_of_a_client_can_start_another_request(pd: Deployment) -> None:
    """Nor do its hop-by-hop headers, or trailers, come to an engine."""
    body = json.dumps(pd.prompt).encode()
    answer = await exchange(
        pd,
        HEAD
        + b"X-Request-Id: a\tb\xff\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Connection: x\r\nExpect: 100-continue\r\n"
        + b"Connection: close, x-session-id\r\nTransfer-Encoding: chunked\r\n\r\n"
        + as_chunk(body)
        + b"0\r\nAuthorization: Bearer x\r\n\r\n",
    )
    assert statuses(answer)[-1] == 200
    for engine in pd.engines:
        names = engine.received[0].headers.keys()
        assert names <= {"host", "content-type", "x-request-id", "content-length", "traceparent", "tracestate"}


async def test_a_body_in_one_byte_pieces(pd: Deployment) -> None:
    request = completion(prompt="x" * 100_000)
    reader, writer = await pd.raw(b"")
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(request), 2000):
        for position in range(start, min(start + 2000, len(request))):
            writer.write(request[position : position + 1])
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    assert len(pd.decode[0].received[0].body["prompt"]) == 100_000
    writer.close()


async def test_pipelined_requests_are_answered_in_order(pd: Deployment) -> None:
    """The last one's fault is its own."""
    answer = await exchange(pd, completion() + LIVE + completion(stream=True) + LIVE + b"nonsense\r\n\r\n")
    assert statuses(answer) == [200, 200, 200, 200, 400]
    bodies = re.findall(rb'"object": "text_completion"|"ok"|\[DONE\]|"code"', answer)
    assert list(dict.fromkeys(bodies)) == [b'"object": "text_completion"', b'"ok"', b"[DONE]", b'"code"']


async def test_a_client_of_http_1_0(pd: Deployment) -> None:
    """Its stream has no chunk framing, and ends with the connection."""
    request = completion(stream=True).replace(b"HTTP/1.1", b"HTTP/1.0\r\nConnection: keep-alive")
    head, _, body = (await exchange(pd, request)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_expect_continue(pd: Deployment) -> None:
    request = completion().replace(b"Host", b"Expect: 100-continue\r\nHost")
    head, _, body = request.partition(b"\r\n\r\n")
    reader, writer = await pd.raw(LIVE + head + b"\r\n\r\n")
    async with asyncio.timeout(20):
        live = await reader.readuntil(b'{"status":"ok"}')
        assert statuses(live) == [200], "answers come in the order of the requests"
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_no_go_ahead_for_a_body_that_is_too_large(deploy: Deploy) -> None:
    pd = await deploy(max_body_bytes=100)
    answer = await exchange(pd, HEAD + b"Expect: 100-continue\r\nContent-Length: 101\r\n\r\n")
    assert statuses(answer) == [413]


async def test_a_refusal_is_read_by_a_client_that_is_still_sending(deploy: Deploy) -> None:
    """Its unread bytes would reset the connection before it has read the answer. And they are not kept."""
    pd = await deploy(max_body_bytes=1000)
    reader, writer = await pd.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(50):
        writer.write(as_chunk(b"x" * 65536))
        await asyncio.sleep(0)
    assert statuses(await rest(reader)) == [413]
    writer.close()
    assert all(engine.received == [] for engine in pd.engines)


async def test_strangers_are_answered_by_their_heads_alone(deploy: Deploy, logged: Logged, tmp_path: Path) -> None:
    """Not a byte of a body is sent here. The second of each has asked for leave to send it."""
    key, entry = new_key("me")
    file = tmp_path / "keys"
    file.write_text(entry.line() + "\n")
    pd = await deploy(api_keys_file=file)
    bearer = b"Authorization: Bearer %b\r\n" % key.encode()
    large = b"Content-Length: 9000000\r\n\r\n"
    expecting = b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    for head, status in (
        (HEAD, 401),
        (HEAD.replace(b"/v1/completions", b"/nothing"), 404),
        (HEAD.replace(b"POST", b"PUT"), 405),
        (HEAD.replace(b"application/json", b"text/plain") + bearer, 400),
    ):
        for announced in (large, expecting, b"Transfer-Encoding: chunked\r\n\r\n"):
            answer = await exchange(pd, head + announced)
            assert statuses(answer) == [status]
            assert b"\r\nconnection: close\r\n" in answer
            assert b"\r\nx-request-id: " in answer
    admin = HEAD.replace(b"/v1/completions", b"/admin/v1/instances")
    assert statuses(await exchange(pd, admin + large)) == [413]
    lines = await logged(13)
    assert [line["status"] for line in lines] == [401] * 3 + [404] * 3 + [405] * 3 + [400] * 3 + [413]
    assert lines[0]["error"] == "UnauthorizedError"
    assert await pd.metric("omni_proxy_refused_total", reason="unauthorized") == 3


async def test_a_stranger_who_is_still_sending_reads_why(deploy: Deploy) -> None:
    pd = await deploy()
    reader, writer = await pd.raw(HEAD.replace(b"/v1", b"/v9") + b"Content-Length: 9000000\r\n\r\n")
    for _ in range(50):
        writer.write(b"x" * 65536)
        await asyncio.sleep(0)
    assert statuses(await rest(reader)) == [404]
    writer.close()


async def test_a_connection_outlives_a_stranger(pd: Deployment) -> None:
    """If what is read past is small."""
    wrong = completion(prompt="x" * 50_000).replace(b"/v1", b"/v9", 1)
    answer = await exchange(pd, wrong + completion() + wrong + LIVE + b"nonsense\r\n\r\n")
    assert statuses(answer) == [404, 200, 404, 200, 400]


async def test_all_bodies_together_are_bounded(deploy: Deploy) -> None:
    pd = await deploy(max_body_bytes=1000, max_body_bytes_total=1500)
    pd.prefill[0].gate.clear()
    first = completion(prompt="x" * 900)
    reader, writer = await pd.raw(first)
    await pd.prefill[0].wait_for(1)
    for request in (first, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + as_chunk(b"x" * 900)):
        answer = await exchange(pd, request)
        assert statuses(answer) == [503]
        assert b"\r\nretry-after: 1\r\n" in answer
    pd.prefill[0].gate.set()
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await pd.idle()
    _, _, answered = await pd.complete(prompt="x" * 900)
    assert answered["x-omni-path"] == "disaggregated"
    assert pd.server._bodies.num_bytes == 0


@pytest.mark.parametrize("stage", ["queued", "prefill", "stream"])
async def test_client_leaves(deploy: Deploy, stage: str) -> None:
    pd = await deploy(max_active_per_decode=1)
    pd.prefill[0].gate.clear()
    pd.decode[0].gate.clear()
    pd.decode[0].gate_after = 1
    other: asyncio.StreamWriter | None = None
    if stage == "queued":
        _, other = await pd.raw(completion())
        await pd.prefill[0].wait_for(1)
    reader, writer = await pd.raw(completion(stream=True))
    if stage == "queued":
        await until(lambda: len(pd.proxy.in_flight) == 2)
    elif stage == "prefill":
        await pd.prefill[0].wait_for(1)
    else:
        pd.prefill[0].gate.set()
        async with asyncio.timeout(20):
            await reader.readuntil(b"data: ")
    writer.transport.abort()
    if stage == "queued":
        await until(lambda: len(pd.proxy.in_flight) == 1)
        assert len(pd.prefill[0].received) == 1
    elif stage == "prefill":
        await pd.prefill[0].wait_for(1, num_aborted=1)
        assert pd.decode[0].received == []
    else:
        await pd.decode[0].wait_for(1, num_aborted=1)
    if other is not None:
        other.transport.abort()
    await pd.idle()


async def slow_reader(pd: Deployment) -> tuple[socket.socket, int]:
    """A client that asks for an endless stream and reads none of it; how much D wrote until it had to stop."""
    pd.decode[0].num_chunks = 10**6
    sock = socket.create_connection(("127.0.0.1", pd.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(completion(stream=True, model="m" * 50_000))
    await pd.decode[0].wait_for(1)
    connection = next(iter(pd.server._connections))
    transport = connection._transport
    await until(lambda: connection._behind)
    async with asyncio.timeout(20):
        size = -1
        while size != transport.get_write_buffer_size():
            size = transport.get_write_buffer_size()
            await asyncio.sleep(0.2)
    return sock, size


async def test_slow_reader(deploy: Deploy) -> None:
    """What waits for it is bounded, for D is paused; others are served; then it is cut off, and D's work ended."""
    pd = await deploy(reader_timeout_s=2.0)
    sock, num_waiting_bytes = await slow_reader(pd)
    assert num_waiting_bytes < 1_000_000
    status, _, _ = await pd.complete()
    assert status == 200
    await pd.decode[0].wait_for(2, num_aborted=1)
    await pd.idle()
    sock.close()
