"""Engines that refuse, fail, hang or die: what the client gets, and that nothing is left behind."""

import asyncio
import gc
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.request_body import RequestBody
from tests.services.global_proxy.conftest import FOREVER_S, Deploy, Deployment, until

BAD_REQUEST = '{"error": {"message": "too  long",  "type": "BadRequestError", "param": null, "code": 400}}'


def assert_error(body: Any, status: int, kind: str) -> None:
    assert body["error"]["code"] == status
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    assert "param" in body["error"]


@pytest.mark.parametrize(
    ("role", "status", "text"),
    [
        ("decode", 400, BAD_REQUEST),
        ("decode", 401, "{}"),
        ("decode", 404, "nope"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_engine_refuses_is_refused_in_its_words(
    pd: Deployment, role: str, status: int, text: str, stream: bool
) -> None:
    (engine,) = getattr(pd, role)
    engine.error = (status, text)
    async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": stream}) as response:
        assert response.status == status
        assert await response.text() == text
        assert response.headers["Retry-After"] == "7"
        assert response.headers["x-omni-path"] == "disaggregated"
    assert len(pd.decode[0].received) == 1
    assert await pd.failures(engine, f"status_{status}") == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("status", "told", "kind"),
    [(500, 500, "InternalServerError"), (503, 503, "ServiceUnavailableError"), (599, 502, "BadGatewayError")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_failure_is_told_in_our_words(
    pd: Deployment, role: str, status: int, told: int, kind: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own are in the log, once, under the request's id."""
    (engine,) = getattr(pd, role)
    engine.error = (status, "/home/secret: CUDA error")
    async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": stream}) as response:
        assert response.status == told
        assert "secret" not in await response.text()
        assert_error(await response.json(), told, kind)
        assert response.headers.get("Retry-After") == ("7" if status == 503 else None)
        assert response.headers["x-omni-path"] == "disaggregated"
        assert f"request {response.headers['x-request-id']}: " in caplog.text
    assert caplog.text.count("secret") == 1
    assert len(pd.decode[0].received) == (1 if role == "decode" else 0)
    if status == told:  # of others the metric has no series
        assert await pd.failures(engine, f"status_{status}") == 1


async def test_what_prefill_refuses_is_for_decode_to_judge(pd: Deployment) -> None:
    """P's message would speak of P's rewritten request."""
    pd.prefill[0].error = (400, BAD_REQUEST)
    status, _, headers = await pd.complete()
    assert status == 200
    assert headers["x-omni-path"] == "decode_only"
    assert pd.decode[0].received[0].body == pd.prompt
    assert await pd.metric("omni_proxy_decode_only_total", reason="prefill_refused") == 1
    assert await pd.failures(pd.prefill[0], "status_400") == 0


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
    assert await pd.failures(pd.prefill[0], "nonsense") == 1


async def test_prefill_that_goes_on_answering_nonsense_is_avoided(deploy: Deploy) -> None:
    pd = await deploy(2, 1)
    pd.prefill[0].answer_text = "not json"
    for _ in range(10):
        assert (await pd.complete())[0] == 200
    assert await pd.failures(pd.prefill[0], "nonsense") == 3


async def test_prefill_that_goes_away_is_replaced_and_then_avoided(deploy: Deploy) -> None:
    pd = await deploy(2, 1, health_interval_s=FOREVER_S)
    await pd.checked()
    await pd.prefill[0].stop()
    for _ in range(4):
        assert (await pd.complete())[0] == 200
    assert len(pd.prefill[1].received) == 4
    assert await pd.failures(pd.prefill[0], "unreachable") == 1


async def test_one_that_fails_its_health_checks_is_not_tried(deploy: Deploy, refused_urls: tuple[str, str]) -> None:
    pd = await deploy(1, 1, refused_urls[:1], refused_urls[1:])
    await pd.checked()
    for _ in range(3):
        assert (await pd.complete())[0] == 200
    for role, url in zip(("prefill", "decode"), refused_urls, strict=True):
        labels = {"role": role, "instance": url[7:]}
        assert await pd.metric("omni_proxy_upstream_failures_total", **labels, reason="unreachable") == 0
        assert await pd.metric("omni_proxy_instance_up", **labels) == 0


async def test_prefill_that_dies_is_replaced(deploy: Deploy) -> None:
    pd = await deploy(2, 1)
    pd.prefill[0].die_after = 0
    assert (await pd.complete())[0] == 200
    assert [len(e.received) for e in pd.prefill] == [1, 1]
    assert len(pd.decode[0].received) == 1


async def test_prefill_is_tried_as_often_as_the_settings_say(deploy: Deploy) -> None:
    pd = await deploy(4, 1, max_retries=2)
    for engine in pd.prefill:
        engine.die_after = 0
    status, body, _ = await pd.complete()
    assert status == 502
    assert_error(body, 502, "BadGatewayError")
    assert [len(e.received) for e in pd.prefill] == [1, 1, 1, 0]
    assert await pd.metric("omni_proxy_retries_total", role="prefill", reason="died") == 2


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_nobody_there(deploy: Deploy, role: str) -> None:
    pd = await deploy(health_interval_s=FOREVER_S)
    await pd.checked()
    (engine,) = getattr(pd, role)
    await engine.stop()
    for _ in range(2):
        status, body, headers = await pd.complete()
        assert status == 503
        assert_error(body, 503, "ServiceUnavailableError")
        assert headers["retry-after"] == "1"
    assert await pd.failures(engine, "unreachable") == 2 * 2  # the only one is asked twice
    await pd.idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_nobody_was_ever_there(deploy: Deploy, refused_url: str, role: str) -> None:
    urls = {f"extra_{role}_urls": (refused_url,)}
    pd = await deploy(int(role != "prefill"), int(role != "decode"), **urls)
    assert await pd.proxy.members.missing_roles() == [role]
    status, body, headers = await pd.complete()
    assert status == 503
    assert_error(body, 503, "ServiceUnavailableError")
    assert headers["retry-after"] == "1"


async def test_decode_that_goes_away_is_replaced_with_the_same_handoff(deploy: Deploy) -> None:
    pd = await deploy(1, 2, health_interval_s=FOREVER_S)
    await pd.checked()
    await pd.decode[0].stop()
    status, body, _ = await pd.complete()
    assert status == 200
    assert body["choices"][0]["text"] == "d1!"
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
async def test_decode_that_dies_before_its_first_byte_is_replaced_after_a_fresh_prefill(
    deploy: Deploy, stream: bool
) -> None:
    """It may have read the blocks already, and P then has given them up."""
    pd = await deploy(1, 2)
    pd.decode[0].die_after = 0
    assert (await (pd.stream() if stream else pd.complete()))[0] == 200
    assert [len(e.received) for e in pd.decode] == [1, 1]
    assert len(pd.prefill[0].received) == 2
    await pd.idle()


async def test_the_only_decode_dies_before_its_first_byte(pd: Deployment) -> None:
    pd.decode[0].die_after = 0
    status, body, _ = await pd.complete()
    assert status == 502
    assert_error(body, 502, "BadGatewayError")
    assert len(pd.decode[0].received) == 1
    await pd.idle()


async def test_a_lost_decode_takes_no_request_with_it(deploy: Deploy) -> None:
    """However many it had: more than the retries that a quiet proxy has at hand."""
    pd = await deploy(1, 2, decode_policy="round_robin")
    pd.decode[0].gate.clear()
    requests = [asyncio.create_task(pd.complete()) for _ in range(100)]
    await pd.decode[0].wait_for(50)
    pd.decode[0].die_after = 0
    pd.decode[0].gate.set()
    assert [(await request)[0] for request in requests] == [200] * 100
    assert await pd.metric("omni_proxy_ejections_total", role="decode", instance=pd.decode[0].url[7:]) == 1
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


async def test_client_leaves_while_it_waits_to_be_admitted(deploy: Deploy) -> None:
    pd = await deploy(max_active_per_decode=1)
    pd.prefill[0].gate.clear()
    first = asyncio.create_task(pd.complete())
    await pd.prefill[0].wait_for(1)
    second = asyncio.create_task(pd.complete())
    await until(lambda: len(pd.proxy.in_flight) == 2)
    second.cancel()
    await until(lambda: len(pd.proxy.in_flight) == 1)
    pd.prefill[0].gate.set()
    assert (await first)[0] == 200
    assert (await pd.complete())[0] == 200
    assert [len(engine.received) for engine in pd.engines] == [2, 2]
    await pd.idle()


async def test_with_no_prefill_up_decode_computes_prompts_if_told_so(deploy: Deploy, refused_url: str) -> None:
    pd = await deploy(0, 1, extra_prefill_urls=(refused_url,), fallback="decode_only")
    await pd.checked()
    status, _, headers = await pd.complete()
    assert (status, headers["x-omni-path"]) == (200, "decode_only")
    assert pd.decode[0].received[0].body == pd.prompt
    assert await pd.metric("omni_proxy_decode_only_total", reason="no_prefill_up") == 1


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
    await pd.checked()
    for stream in (False, True, False, True):
        await (pd.stream() if stream else pd.complete())
    assert pd.num_connections == 2


async def test_answered_requests_are_never_counted_as_abandoned(pd: Deployment) -> None:
    for _ in range(20):
        await pd.complete()
        await pd.stream()
    await pd.idle()
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="200") == 40
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 0


def bodies_held() -> set[int]:
    """By `type`: to ask some of torch's objects for their class is to be warned."""
    objects = gc.get_objects()
    bodies = {id(one) for one in objects if type(one) is RequestBody}
    return bodies | {id(one) for one in objects if type(one) is ClientRequest and one.body}


@pytest.mark.parametrize("failing", ["prefill", "decode", "tokenize", "body"])
async def test_the_body_of_a_request_that_failed_is_not_left_to_the_garbage_collector(
    pd: Deployment, failing: str
) -> None:
    """Which comes rarely: bodies of many megabytes would pile up."""
    path, body = "/v1/completions", json.dumps(pd.prompt)
    if failing == "body":
        path, body = "/tokenize", body[:-1]
    for engine in pd.prefill + pd.decode:
        engine.error = (503, "no") if failing in ("tokenize", "prefill") or engine in pd.decode else None
    if failing == "tokenize":
        path = "/tokenize"
    gc.collect()
    before = bodies_held()  # by other tests' leavings
    gc.disable()
    try:
        async with pd.client.post(pd.url + path, data=body, headers={"Content-Type": "application/json"}) as response:
            assert response.status >= 400
        await asyncio.sleep(0.05)  # for the proxy to have done with it
        assert bodies_held() <= before
    finally:
        gc.enable()
