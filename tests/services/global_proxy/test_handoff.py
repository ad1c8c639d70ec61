"""The two legs: what each engine is sent, and what the client gets."""

import io
import json
from typing import Any

import pytest

from tests.services.global_proxy.conftest import Deploy, Deployment
from tests.standins.engine import KV_TRANSFER_PARAMS

CHAT: dict[str, Any] = {"prompt": None, "messages": [{"role": "user", "content": "Hi"}]}


async def test_answer_comes_from_decode(pd: Deployment) -> None:
    status, body, headers = await pd.complete()
    assert status == 200
    assert body["choices"][0]["text"] == "d0!"
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["x-omni-path"] == "disaggregated"


async def test_prefill_is_asked_for_one_token_and_a_handoff(pd: Deployment) -> None:
    await pd.complete(n=3, temperature=0.5, stream_options=None, ignore_eos=False, min_tokens=4)
    (sent,) = pd.prefill[0].received
    assert sent.body == {
        "model": "m",
        "prompt": "Hello",
        "temperature": 0.5,
        "max_tokens": 1,
        "min_tokens": 1,
        "ignore_eos": True,
        "n": 1,
        "stream": False,
        "return_token_ids": True,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
            "omni": {"num_readers": 3},
        },
    }


async def test_decode_gets_the_request_unchanged_plus_parameters(pd: Deployment) -> None:
    fields: dict[str, Any] = {"n": 2, "stop": ["x"], "logprobs": 2, "min_tokens": 3, "seed": 2**80}
    await pd.complete(**fields)
    (sent,) = pd.decode[0].received
    assert sent.body == pd.prompt | fields | {"kv_transfer_params": KV_TRANSFER_PARAMS}


async def test_max_completion_tokens_is_limited_only_on_prefill_and_only_if_present(pd: Deployment) -> None:
    await pd.complete("/v1/chat/completions", **CHAT, max_completion_tokens=50)
    assert pd.prefill[0].received[0].body["max_completion_tokens"] == 1
    assert pd.decode[0].received[0].body["max_completion_tokens"] == 50
    await pd.complete("/v1/chat/completions", **CHAT)
    assert "max_completion_tokens" not in pd.prefill[0].received[1].body


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["a"]),
        ("stop_token_ids", [2]),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("stream_options", {"include_usage": True}),
        ("structured_outputs", {"choice": [""]}),
        ("echo", True),
        ("allowed_token_ids", [2]),
    ],
)
async def test_prefill_is_spared_what_only_shapes_the_output(pd: Deployment, name: str, value: Any) -> None:
    await pd.stream(**{name: value, **({} if name != "echo" else {"logprobs": None})})
    assert name not in pd.prefill[0].received[0].body
    assert pd.decode[0].received[0].body[name] == value


@pytest.mark.parametrize("name", ["tools", "tool_choice", "response_format", "chat_template_kwargs", "cache_salt"])
async def test_prefill_keeps_what_can_reach_the_prompt(pd: Deployment, name: str) -> None:
    await pd.complete("/v1/chat/completions", **CHAT, **dict[str, Any]({name: "x"}))
    assert pd.prefill[0].received[0].body[name] == "x"


async def test_stream_is_relayed_byte_for_byte(pd: Deployment) -> None:
    status, text, headers = await pd.stream()
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["x-omni-path"] == "disaggregated"
    events = text.split("\n\n")
    assert [json.loads(e[6:])["choices"][0]["text"] for e in events[:3]] == ["t0 ", "t1 ", "t2 "]
    assert events[3:] == ["data: [DONE]", ""]
    assert pd.prefill[0].received[0].body["stream"] is False


async def test_chunks_arrive_as_they_are_made(pd: Deployment) -> None:
    (decode,) = pd.decode
    decode.gate.clear()
    decode.gate_after = 1
    async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": True}) as response:
        assert b"t0 " in await response.content.readany()
        decode.gate.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_large_prompt(pd: Deployment) -> None:
    prompt = "é" * 2_000_000
    body = io.BytesIO(json.dumps({"prompt": prompt}, ensure_ascii=False).encode())
    headers = {"Content-Type": "application/json"}
    async with pd.client.post(pd.url + "/v1/completions", data=body, headers=headers) as response:
        assert response.status == 200
    assert pd.prefill[0].received[0].body["prompt"] == prompt
    assert pd.decode[0].received[0].body["prompt"] == prompt


async def test_instances_take_turns(deploy: Deploy) -> None:
    pd = await deploy(2, 3)
    for _ in range(6):
        await pd.complete()
    assert [len(e.received) for e in pd.prefill] == [3, 3]
    assert [len(e.received) for e in pd.decode] == [2, 2, 2]


async def test_client_cannot_set_transfer_parameters(pd: Deployment) -> None:
    forged = {"do_remote_prefill": True, "remote_engine_id": "other"}
    forged_fields: dict[str, Any] = {
        "kv_transfer_params": forged,
        "ec_transfer_params": forged,
        "request_id": "same",
        "vllm_xargs": {"kv_transfer_params": "x", "ec_transfer_params": "x", "mine": 1},
    }
    await pd.complete(**forged_fields)
    await pd.complete(**forged_fields, use_beam_search=True)
    for sent in [*pd.prefill[0].received, *pd.decode[0].received]:
        assert "other" not in json.dumps(sent.body)
        assert "request_id" not in sent.body
        assert "ec_transfer_params" not in sent.body
        assert sent.body["vllm_xargs"] == {"mine": 1}


DECODE_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("batch", {"prompt": ["a", "b"]}),
    ("batch", {"prompt": [[1, 2], [3]]}),
    ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("echo_logprobs", {"echo": True, "logprobs": 0}),
    ("echo_logprobs", {"echo": True, "messages": []}),
    ("beam_search", {"use_beam_search": True}),
    ("prompt_embeds", {"prompt_embeds": "AAAA"}),
    ("invalid", {"n": 0}),
    ("invalid", {"n": True}),
    ("invalid", {"max_tokens": -1}),
    ("invalid", {"max_completion_tokens": "many"}),
]


@pytest.mark.parametrize(("reason", "fields"), DECODE_ONLY)
async def test_decode_serves_alone(pd: Deployment, reason: str, fields: dict[str, Any]) -> None:
    status, _, headers = await pd.complete(**fields, kv_transfer_params={"do_remote_prefill": True})
    assert status == 200
    assert headers["x-omni-path"] == "decode_only"
    assert pd.prefill[0].received == []
    assert pd.decode[0].received[0].body == pd.prompt | fields
    assert await pd.metric("omni_proxy_decode_only_total", reason=reason) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a"]},
        {"prompt": [[1, 2]]},
        {"prompt": [1, 2, 3]},
        {"echo": True},
        {"logprobs": 1},
        {"prompt_logprobs": None, "use_beam_search": False, "prompt_embeds": None, "echo": False},
    ],
)
async def test_one_handoff_is_enough(pd: Deployment, fields: dict[str, Any]) -> None:
    _, _, headers = await pd.complete(**fields)
    assert headers["x-omni-path"] == "disaggregated"


async def test_prefill_without_parameters_leaves_the_request_to_decode(pd: Deployment) -> None:
    pd.prefill[0].params = None
    status, _, headers = await pd.complete()
    assert status == 200
    assert headers["x-omni-path"] == "decode_only"
    assert pd.decode[0].received[0].body == pd.prompt
    assert await pd.metric("omni_proxy_decode_only_total", reason="prefill_gave_no_params") == 1


async def test_headers_to_the_engines(pd: Deployment) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sent = {
        "Authorization": "Bearer key",
        "traceparent": trace,
        "tracestate": "a=b",
        "X-Request-Id": "mine",
        "X-data-parallel-rank": "7",
        "Cookie": "a=b",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
    }
    _, _, headers = await pd.complete(headers=sent)
    assert headers["x-request-id"] == "mine"
    ids = set()
    for engine in pd.engines:
        got = engine.received[0].headers
        assert got["authorization"] == "Bearer key"
        assert got["traceparent"] == trace
        assert got["tracestate"] == "a=b"
        assert got["content-type"] == "application/json"
        assert not {"cookie", "x-hop", "x-data-parallel-rank"} & set(got)
        ids.add(got["x-request-id"])
    assert len(ids) == 1
    assert "mine" not in ids


async def test_every_request_has_its_own_id(pd: Deployment) -> None:
    for _ in range(2):
        await pd.complete(headers={"X-Request-Id": "same"})
    first, second = (r.headers["x-request-id"] for r in pd.decode[0].received)
    assert first != second
    _, body, headers = await pd.complete()
    assert body["id"] == "cmpl-" + headers["x-request-id"]
