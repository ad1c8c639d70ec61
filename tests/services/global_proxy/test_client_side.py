"""What clients may send, what they may not, and the smaller endpoints."""

import asyncio
import json
import re
from typing import Any

import openai
import pytest

from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from tests.services.global_proxy.conftest import Deploy, Deployment, Logged, until
from tests.services.global_proxy.http.fake_transport import FakeTransport

MALFORMED = {
    "empty": b"",
    "not JSON": b"hello",
    "cut off": b'{"prompt": "a"',
    "trailing": b'{"prompt": "a"} x',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "bad UTF-8 key": b'{"\xff": 1}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "raw NUL": b'{"prompt": "a\x00"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "deep but closed": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a list": b"[1]",
    "a string": b'"prompt"',
    "null": b"null",
    "no fields": b"{}",
    "n too large": b'{"prompt": "a", "n": 129}',
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_malformed_body(pd: Deployment, name: str, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    async with pd.client.post(pd.url + path, data=MALFORMED[name], headers=headers) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["param"] == ("n" if name == "n too large" else None)
    assert all(engine.received == [] for engine in pd.engines)


async def test_nesting_near_the_limit_never_fails_inside(pd: Deployment) -> None:
    """Whatever can be read can be written, or is refused before anything is sent."""
    for depth in range(850, 1010, 2):
        body = b'{"prompt":"a","x":' + b"[" * depth + b"]" * depth + b"}"
        headers = {"Content-Type": "application/json"}
        async with pd.client.post(pd.url + "/v1/completions", data=body, headers=headers) as response:
            assert response.status in (200, 400)
            if response.status == 400:
                num_sent = [len(engine.received) for engine in pd.engines]
                assert num_sent[0] == num_sent[1]


async def test_escaped_nul_and_unknown_fields_are_the_engines_business(pd: Deployment) -> None:
    await pd.complete(prompt="a\x00b", mystery={"a": [1, None]})
    assert pd.decode[0].received[0].body["prompt"] == "a\x00b"
    assert pd.decode[0].received[0].body["mystery"] == {"a": [1, None]}


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/json-x"])
async def test_other_content_types(pd: Deployment, content_type: str) -> None:
    status, body, _ = await pd.complete(headers={"Content-Type": content_type})
    assert status == 400
    assert "application/json" in body["error"]["message"]


async def test_content_type_with_parameters(pd: Deployment) -> None:
    status, _, _ = await pd.complete(headers={"Content-Type": "Application/JSON ; charset=utf-8"})
    assert status == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def test_announced_body_too_large(deploy: Deploy) -> None:
    pd = await deploy(max_body_bytes=1000)
    reader, writer = await pd.raw(HEAD + b"Content-Length: 1001\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_unannounced_body_too_large(deploy: Deploy) -> None:
    pd = await deploy(max_body_bytes=1000)
    reader, writer = await pd.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_body_of_exactly_the_limit(deploy: Deploy) -> None:
    pd = await deploy(max_body_bytes=1000)
    body = json.dumps(pd.prompt).encode().ljust(1000)
    async with pd.client.post(
        pd.url + "/v1/completions", data=body, headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 200


async def test_body_that_does_not_arrive(deploy: Deploy) -> None:
    pd = await deploy(body_timeout_s=0.2)
    reader, writer = await pd.raw(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_client_leaves_while_sending_its_body(pd: Deployment) -> None:
    """There was no request."""
    _, writer = await pd.raw(HEAD + b"Content-Length: 100\r\n\r\n{")
    await until(lambda: len(pd.server._connections) == 1)
    writer.close()
    await until(lambda: len(pd.server._connections) == 0)
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 0
    assert pd.prefill[0].received == []


async def test_both_lengths_are_refused(pd: Deployment) -> None:
    reader, writer = await pd.raw(HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert pd.prefill[0].received == []
    writer.close()


async def test_pipelined_requests_are_answered_in_order(pd: Deployment) -> None:
    one = HEAD + b"Content-Length: 14\r\n\r\n" + b'{"prompt":"a"}'
    last = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reader, writer = await pd.raw(one + one + last)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.endswith(b'{"status":"ok"}')
    writer.close()


@pytest.mark.parametrize("path", ["/v1/audio", "/v1/completions/", "/v1", "//live", "/"])
async def test_unknown_path(pd: Deployment, path: str) -> None:
    async with pd.client.post(pd.url + path, json={"prompt": "a"}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["type"] == "NotFoundError"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/v1/completions", "POST"), ("POST", "/health", "GET"), ("PUT", "/docs", "GET")],
)
async def test_wrong_method(pd: Deployment, method: str, path: str, allow: str) -> None:
    async with pd.client.request(method, pd.url + path) as response:
        assert response.status == 405
        assert response.headers["Allow"] == allow
        assert (await response.json())["error"]["code"] == 405


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/detokenize"])
async def test_what_one_engine_answers_alone(deploy: Deploy, path: str) -> None:
    pd = await deploy(1, 2)
    pd.decode[0].error = (500, "{}")
    sent = {"Authorization": "Bearer key", "Cookie": "a=b"}
    async with pd.client.post(pd.url + path, json={"input": "é"}, headers=sent) as response:
        assert (response.status, await response.json()) == (200, {"from": "d1"})
    (received,) = pd.decode[1].received
    assert (received.path, received.body) == (path, {"input": "é"})
    assert received.headers["authorization"] == "Bearer key"
    assert "cookie" not in received.headers
    assert pd.prefill[0].received == []
    await pd.idle()


async def test_what_all_engines_fail_at_is_told_in_our_words(deploy: Deploy, caplog: pytest.LogCaptureFixture) -> None:
    pd = await deploy(1, 2)
    for engine in pd.engines:
        engine.error = (500, '{"error":  "mine"}')
    async with pd.client.post(pd.url + "/tokenize", json={"prompt": "a"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (500, 500, "InternalServerError")
        assert "mine" not in error["message"]
        assert f"request {response.headers['x-request-id']}: " in caplog.text
    assert caplog.text.count("mine") == 1


async def test_what_all_engines_refuse_is_refused_in_theirs(pd: Deployment) -> None:
    pd.decode[0].error = (400, '{"error":  "yours"}')
    async with pd.client.post(pd.url + "/tokenize", json={"prompt": "a"}) as response:
        assert (response.status, await response.text()) == (400, '{"error":  "yours"}')


async def test_every_answer_has_a_request_id(logged: Logged, deploy: Deploy) -> None:
    """The client's own where it gave one. Engines are given ours, and the log has both."""
    pd = await deploy()
    for path in ("/live", "/metrics", "/nothing", "/admin/v1/state", "/v1/models"):
        async with pd.client.get(pd.url + path) as response:
            assert len(response.headers.getall("x-request-id")) == 1
            assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    (line,) = (line for line in await logged(2) if line["path"] == "/v1/models")
    assert line["id"] == response.headers["x-request-id"]
    mine = {"X-Request-Id": "mine"}
    async with pd.client.post(pd.url + "/tokenize", json={"prompt": "a"}, headers=mine) as response:
        assert response.headers["x-request-id"] == "mine"
    (line,) = (line for line in await logged(3) if line["path"] == "/tokenize")
    assert line["client_id"] == "mine"
    assert pd.decode[0].received[-1].headers["x-request-id"] == line["id"]


async def test_nobody_is_served_who_was_not_at_the_door(pd: Deployment) -> None:
    """Heads are looked at before bodies come. A request that was not is looked at when it is to be served."""
    for path, status in ((b"/nothing", 404), (b"/live", 200)):
        request = ClientRequest("GET", path)
        reply = Reply(FakeTransport(), request, closing=False)
        async with asyncio.timeout(20):
            await pd.proxy.serve(request, reply)
        assert reply.status == status


async def test_what_one_engine_answers_alone_goes_to_the_least_busy(deploy: Deploy) -> None:
    pd = await deploy(1, 2)
    pd.decode[0].gate.clear()
    pd.decode[1].gate.clear()
    request = asyncio.create_task(pd.complete())
    await until(lambda: any(engine.received for engine in pd.decode))
    busy, idle = sorted(pd.decode, key=lambda engine: -len(engine.received))
    async with pd.client.post(pd.url + "/tokenize", json={"prompt": "a"}) as response:
        assert await response.json() == {"from": idle.name}
    busy.gate.set()
    assert (await request)[0] == 200


async def test_models_come_from_decode_first(pd: Deployment) -> None:
    async with pd.client.get(pd.url + "/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "d0"
    async with pd.client.get(pd.url + "/version") as response:
        assert await response.json() == {"version": "0.32.0"}
    async with pd.client.get(pd.url + "/v1/models", headers={"Authorization": "Bearer wrong"}) as response:
        assert response.status == 401


async def test_models_from_whoever_is_there(deploy: Deploy, refused_url: str) -> None:
    pd = await deploy(1, 0, extra_decode_urls=(refused_url,))
    async with pd.client.get(pd.url + "/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "p0"


async def test_models_when_nobody_is_there(deploy: Deploy, refused_urls: tuple[str, str]) -> None:
    pd = await deploy(0, 0, refused_urls[:1], refused_urls[1:])
    async with pd.client.get(pd.url + "/v1/models") as response:
        assert response.status == 503
        assert (await response.json())["error"]["type"] == "ServiceUnavailableError"


async def test_health(deploy: Deploy) -> None:
    pd = await deploy(2, 1, health_interval_s=0.02)

    async def health() -> tuple[int, object]:
        async with pd.client.get(pd.url + "/health") as response:
            return response.status, await response.json()

    async def becomes(status: int, body: dict[str, Any]) -> None:
        async with asyncio.timeout(5):
            while await health() != (status, body):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def down() -> int:
        return sum(i.unhealthy for pool in pd.proxy.members.pools for i in pool.instances)

    assert await health() == (200, {"status": "ok"})
    pd.prefill[0].healthy = False
    await until(lambda: down() == 1)
    assert await health() == (200, {"status": "ok"})
    pd.decode[0].healthy = False
    await becomes(503, {"status": "unavailable", "missing": ["decode"]})
    pd.prefill[1].healthy = False
    await becomes(503, {"status": "unavailable", "missing": ["prefill", "decode"]})
    async with pd.client.get(pd.url + "/live") as response:
        assert response.status == 200
    for engine in pd.engines:
        engine.healthy = True
    await becomes(200, {"status": "ok"})


async def test_an_instance_is_watched_whether_or_not_anybody_asks(deploy: Deploy) -> None:
    pd = await deploy(1, 2, health_interval_s=0.02)
    await pd.checked()
    pd.decode[0].healthy = False
    labels = {"role": "decode", "instance": pd.decode[0].url[7:]}
    await until(lambda: pd.proxy.metrics.registry.get_sample_value("omni_proxy_instance_up", labels) == 0)
    for _ in range(3):
        await pd.complete()
    assert pd.decode[0].received == []


async def test_metrics(pd: Deployment) -> None:
    (decode,) = pd.decode
    decode.gate.clear()
    request = asyncio.create_task(pd.stream())
    await decode.wait_for(1)
    async with pd.client.get(pd.url + "/metrics") as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith("text/plain")
    active = f'omni_proxy_active_requests{{instance="{decode.url[7:]}",role="decode"}} 1.0'
    assert active in text
    decode.gate.set()
    await request
    await pd.complete(n=1000)
    await pd.idle()
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="200") == 1
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="400") == 1
    assert await pd.metric("omni_proxy_request_seconds_count") == 2
    assert await pd.metric("omni_proxy_ttft_seconds_count") == 1
    assert await pd.metric("omni_proxy_prefill_seconds_count") == 1


async def test_one_log_line_per_request(logged: Logged, deploy: Deploy) -> None:
    pd = await deploy()
    await pd.complete(headers={"X-Request-Id": 'a"b'})
    await pd.complete(prompt=["a", "b"])
    first, second = await logged(2)
    assert re.fullmatch("[0-9a-f]{32}", first.pop("id"))
    assert 0 < first.pop("ttft_s") <= first.pop("seconds") < 10
    expected = {
        "client_id": 'a"b',
        "path": "/v1/completions",
        "status": 200,
        "prefill": pd.prefill[0].url[7:],
        "decode": pd.decode[0].url[7:],
        "decode_only": None,
        "retries": 0,
        "error": None,
    }
    assert first | expected == first
    assert (second["prefill"], second["decode_only"]) == (None, "batch")


async def test_a_mistake_of_ours(
    pd: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("services.global_proxy.serving.parse_body", fail)
    status, body, _ = await pd.complete()
    assert status == 500
    assert body == {"error": {"message": "Internal error", "type": "InternalServerError", "param": None, "code": 500}}
    assert "a secret" in caplog.text
    assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="500") == 1
    await pd.idle()


async def test_openai_client(pd: Deployment) -> None:
    async with openai.AsyncOpenAI(base_url=pd.url + "/v1", api_key="key", max_retries=0) as client:
        assert [m.id async for m in client.models.list()] == ["d0"]
        completion = await client.completions.create(model="m", prompt="Hi", n=2)
        assert [c.text for c in completion.choices] == ["d0!", "d0!"]
        chat = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
        assert chat.choices[0].message.content == "d0!"
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert [c.choices[0].delta.content async for c in stream] == ["t0 ", "t1 ", "t2 "]
        with pytest.raises(openai.BadRequestError, match="at most 128"):
            await client.completions.create(model="m", prompt="Hi", n=1000)
        with pytest.raises(openai.NotFoundError):
            await client.files.list()


async def test_openai_client_sees_a_broken_stream(pd: Deployment) -> None:
    pd.decode[0].die_after = 2
    async with openai.AsyncOpenAI(base_url=pd.url + "/v1", api_key="key", max_retries=0) as client:
        stream = await client.completions.create(model="m", prompt="Hi", stream=True)
        assert [(await anext(stream)).choices[0].text for _ in range(2)] == ["t0 ", "t1 "]
        with pytest.raises(openai.APIError, match="broke off"):
            await anext(stream)
