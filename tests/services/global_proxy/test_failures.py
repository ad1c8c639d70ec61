"""Engines that refuse, fail, hang or die: what the client gets, and that nothing is left behind."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import aiohttp
import pytest

from tests.services.global_proxy.conftest import Deploy, Deployment

BAD_REQUEST = '{"error": {"message": "too  long",  "type": "BadRequestError", "param": null, "code": 400}}'


def assert_error(body: Any, status: int, kind: str) -> None:
    assert body["error"]["code"] == status
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    assert "param" in body["error"]


@pytest.mark.parametrize(("status", "text"), [(400, BAD_REQUEST), (401, "{}"), (404, "nope"), (500, "{}"), (503, "{}")])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_is_relayed_exactly(
    pd: Deployment, role: str, status: int, text: str, stream: bool
) -> None:
    (engine,) = getattr(pd, role)
    engine.error = (status, text)
    async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": stream}) as response:
        assert response.status == status
        assert await response.text() == text
        assert response.headers["Retry-After"] == "7"
        assert response.headers["x-omni-path"] == "disaggregated"
    assert len(pd.decode[0].received) == (1 if role == "decode" else 0)
    counted = await pd.metric(
        "omni_proxy_upstream_failures_total", role=role, instance=engine.url[7:], reason=f"status_{status}"
    )
    assert counted == (1 if status >= 500 else 0)


async def test_a_request_that_decode_rejects_still_names_the_handoff(pd: Deployment) -> None:
    """vLLM frees P's blocks when D rejects a request, but only if it carries do_remote_prefill."""
    pd.decode[0].error = (400, BAD_REQUEST)
    await pd.complete(max_tokens=10**9)
    assert pd.decode[0].received[0].body["kv_transfer_params"]["do_remote_prefill"] is True


@pytest.mark.parametrize("text", ["not json", "[]", '{"kv_transfer_params": ', ""])
async def test_prefill_answers_nonsense(pd: Deployment, text: str) -> None:
    pd.prefill[0].answer_text = text
    status, body, _ = await pd.complete()
    assert status == 502
    assert_error(body, 502, "BadGatewayError")
    assert pd.decode[0].received == []
    labels = {"role": "prefill", "instance": pd.prefill[0].url[7:], "reason": "died"}
    assert await pd.metric("omni_proxy_upstream_failures_total", **labels) == 1


async def test_refused_prefill_is_replaced_and_then_avoided(deploy: Deploy, refused_url: str) -> None:
    pd = await deploy(1, 1, extra_prefill_urls=(refused_url,))
    for _ in range(4):
        assert (await pd.complete())[0] == 200
    assert len(pd.prefill[0].received) == 4
    failures = await pd.metric(
        "omni_proxy_upstream_failures_total", role="prefill", instance=refused_url[7:], reason="unreachable"
    )
    assert failures == 1


async def test_prefill_that_dies_is_replaced(deploy: Deploy) -> None:
    pd = await deploy(2, 1)
    pd.prefill[0].die_after = 0
    assert (await pd.complete())[0] == 200
    assert [len(e.received) for e in pd.prefill] == [1, 1]
    assert len(pd.decode[0].received) == 1


async def test_prefill_is_tried_twice_at_most(deploy: Deploy) -> None:
    pd = await deploy(3, 1)
    for engine in pd.prefill:
        engine.die_after = 0
    status, body, _ = await pd.complete()
    assert status == 502
    assert_error(body, 502, "BadGatewayError")
    assert sum(len(e.received) for e in pd.prefill) == 2


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_nobody_there(deploy: Deploy, refused_url: str, role: str) -> None:
    urls = {f"extra_{role}_urls": (refused_url,)}
    pd = await deploy(int(role != "prefill"), int(role != "decode"), **urls)
    for _ in range(2):
        status, body, headers = await pd.complete()
        assert status == 503
        assert_error(body, 503, "ServiceUnavailableError")
        assert headers["retry-after"] == "1"
    labels = {"role": role, "instance": refused_url[7:], "reason": "unreachable"}
    assert await pd.metric("omni_proxy_upstream_failures_total", **labels) == 2 * 2  # the only one is asked twice
    await pd.idle()


async def test_refused_decode_is_replaced_with_the_same_handoff(deploy: Deploy, refused_url: str) -> None:
    pd = await deploy(1, 1, extra_decode_urls=(refused_url,))
    status, body, _ = await pd.complete()
    assert status == 200
    assert body["choices"][0]["text"] == "d0!"
    assert len(pd.prefill[0].received) == 1


@pytest.fixture
def silent_url() -> Iterator[str]:
    """An address that lets a connection attempt hang: its queue is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


async def test_connect_timeout_counts_as_unreachable(deploy: Deploy, silent_url: str) -> None:
    pd = await deploy(1, 1, extra_decode_urls=(silent_url,), connect_timeout_s=0.2)
    assert (await pd.complete())[0] == 200
    failures = await pd.metric(
        "omni_proxy_upstream_failures_total", role="decode", instance=silent_url[7:], reason="unreachable"
    )
    assert failures == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_decode_that_dies_before_its_first_byte(deploy: Deploy, stream: bool) -> None:
    pd = await deploy(1, 2)
    pd.decode[0].die_after = 0
    status, body, _ = await pd.complete(stream=stream)
    assert status == 502
    assert_error(body, 502, "BadGatewayError")
    assert pd.decode[1].received == []
    await pd.idle()


@pytest.mark.parametrize("half_event", [False, True])
async def test_decode_that_dies_mid_stream(pd: Deployment, half_event: bool) -> None:
    pd.decode[0].die_after = 2
    pd.decode[0].half_event = half_event
    status, text, _ = await pd.stream()
    assert status == 200
    events = text.split("\n\n")
    assert [json.loads(e[6:])["choices"][0]["text"] for e in events[:2]] == ["t0 ", "t1 "]
    assert_error(json.loads(events[-2][6:]), 502, "BadGatewayError")
    assert events[-1] == ""
    assert len(events) == (5 if half_event else 4)
    assert "[DONE]" not in text
    await pd.idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_deadline_before_the_first_byte(deploy: Deploy, role: str, stream: bool) -> None:
    pd = await deploy(request_timeout_s=0.3)
    (engine,) = getattr(pd, role)
    engine.gate.clear()
    status, body, _ = await pd.complete(stream=stream)
    assert status == 504
    assert_error(body, 504, "GatewayTimeoutError")
    await engine.wait_for(num_aborted=1)
    await pd.idle()


async def test_deadline_mid_stream(deploy: Deploy) -> None:
    pd = await deploy(request_timeout_s=0.3)
    (engine,) = pd.decode
    engine.gate.clear()
    engine.gate_after = 1
    status, text, _ = await pd.stream()
    assert status == 200
    assert_error(json.loads(text.split("\n\n")[1][6:]), 504, "GatewayTimeoutError")
    assert "[DONE]" not in text
    await engine.wait_for(num_aborted=1)


async def test_client_leaves_during_prefill(deploy: Deploy) -> None:
    pd = await deploy(2, 1)
    pd.prefill[0].gate.clear()
    await _leave_when(pd, pd.prefill[0])
    assert pd.decode[0].received == []
    assert pd.prefill[1].received == []


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_before_decodes_first_byte(deploy: Deploy, stream: bool) -> None:
    pd = await deploy(1, 2)
    pd.decode[0].gate.clear()
    await _leave_when(pd, pd.decode[0], stream=stream)
    assert pd.decode[1].received == []


async def _leave_when(pd: Deployment, engine: Any, **fields: Any) -> None:
    """Send a request, hang up once it has reached `engine`, and see it aborted there."""
    request = asyncio.create_task(pd.complete(**fields))
    await engine.wait_for(1)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await engine.wait_for(num_aborted=1)
    await pd.idle()
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 1


async def test_client_leaves_mid_stream(pd: Deployment) -> None:
    (engine,) = pd.decode
    engine.gate.clear()
    engine.gate_after = 1
    async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": True}) as response:
        await response.content.readany()
    await engine.wait_for(num_aborted=1)
    await pd.idle()
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 1


async def test_client_that_reads_nothing_is_cut_off_at_the_deadline(deploy: Deploy) -> None:
    pd = await deploy(request_timeout_s=0.5)
    (engine,) = pd.decode
    engine.num_chunks = 10**9
    body = json.dumps(pd.prompt | {"stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    _, writer = await pd.raw(head % len(body) + body)
    await engine.wait_for(num_aborted=1)
    await pd.idle()
    writer.close()
    await writer.wait_closed()


async def test_connections_to_engines_are_reused(pd: Deployment) -> None:
    session = pd.proxy.runtime.client._session
    for stream in (False, True, False, True):
        await (pd.stream() if stream else pd.complete())
    connector = session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    assert sum(len(idle) for idle in connector._conns.values()) == 2


async def test_answered_requests_are_never_counted_as_abandoned(pd: Deployment) -> None:
    for _ in range(20):
        await pd.complete()
        await pd.stream()
    await pd.idle()
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="200") == 40
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 0
