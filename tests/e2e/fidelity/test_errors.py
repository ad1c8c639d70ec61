"""What a client gets wrong is refused as plain vLLM refuses it: status, type, message, parameter, code."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.deployments import Server, eventually
from tests.e2e.equality import CHAT, COMPLETIONS
from tests.e2e.fidelity.pair import GREEDY, MODEL, FidelityPair, fresh_text

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"max_tokens": 1_000_000},
        {"min_tokens": 9},
        {"min_tokens": -1},
        {"temperature": "hot"},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_k": -5},
        {"model": "another-model"},
        {"n": 0},
        {"n": -1},
        {"n": 2},  # greedy
        {"n": "two"},
        {"stop": 3},
        {"seed": "x"},
        {"presence_penalty": 5},
        {"logit_bias": {"99999": 1}},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [99999]},
        {"structured_outputs": {"regex": "(", "choice": ["a"]}},
        {"structured_outputs": {"regex": "["}},
        {"response_format": {"type": "nonsense"}},
        {"stream_options": {"include_usage": "perhaps"}},
        {"truncate_prompt_tokens": -7},
        {"bad_words": [3]},
        {"priority": "high"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_wrong_parameter(pair: FidelityPair, path: str, change: dict[str, Any], stream: bool) -> None:
    prompt: dict[str, Any] = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": MESSAGES}
    pair.refuse_alike(path, {**prompt, **GREEDY, **change, **({"stream": True} if stream else {})})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": 7},
        {"prompt": [-1]},
        {"prompt": [99999]},
        {"prompt": [1, "a"]},
        {"prompt": "x" * 5000},
        {"logprobs": 100},
        {"logprobs": -2},
        {"prompt_logprobs": 1, "stream": True},
        {"stream_options": {"include_usage": True}},
        {"use_beam_search": True, "stream": True},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_wrong_completion(pair: FidelityPair, change: dict[str, Any]) -> None:
    pair.refuse_alike(COMPLETIONS, {"prompt": "Hello", **GREEDY, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"messages": None},
        {"messages": "Hello"},
        {"messages": [{"role": "user"}, {"content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 100},
        {"max_completion_tokens": 0},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"chat_template": "{{ broken"},
        {"response_format": {"type": "json_schema"}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_wrong_chat(pair: FidelityPair, change: dict[str, Any]) -> None:
    pair.refuse_alike(CHAT, {"messages": MESSAGES, **GREEDY, **change})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_of_no_content(pair: FidelityPair, path: str) -> None:
    refusal = pair.refuse_alike(path, {})
    assert refusal.status == 400
    assert refusal.exception == "BadRequestError"


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "a"', b"[]", b'"x"', b"\xff", b'{"model": NaN}'])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_no_json_object(pair: FidelityPair, path: str, body: bytes) -> None:
    """The parser's words are its own; that it is the client's fault is not. (vLLM's is not always in OpenAI's form.)"""
    (ours, answer), (theirs, _) = (_raw(side.server, "POST", path, body) for side in (pair.ours, pair.plain))
    assert ours == theirs == answer["error"]["code"] == 400
    assert answer["error"]["message"]


def test_another_content_type(pair: FidelityPair) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hello", **GREEDY}).encode()
    answers = [_raw(side.server, "POST", COMPLETIONS, body, "text/plain") for side in (pair.ours, pair.plain)]
    assert [status for status, _ in answers] == [400, 400]
    assert all("application/json" in answer["error"]["message"] for _, answer in answers)


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("POST", "/nothing"), ("DELETE", "/v1/models")])
def test_no_such_route(pair: FidelityPair, method: str, path: str) -> None:
    """vLLM's own answer is not in OpenAI's form; the status is all that both can share."""
    ours, theirs = (_raw(side.server, method, path, None)[0] for side in (pair.ours, pair.plain))
    assert ours == theirs


def test_the_openai_client_raises_what_it_should(pair: FidelityPair) -> None:
    for side in (pair.ours, pair.plain):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            side.client.completions.create(model="another", prompt="Hello")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            side.client.completions.create(model=MODEL, prompt="Hello", max_tokens=-1)


def test_kv_parameters_of_a_client_do_nothing(pair: FidelityPair) -> None:
    """They reach no engine: the answer is that to the same request without them."""
    text = fresh_text(300)
    body: dict[str, Any] = {"model": MODEL, "prompt": text, **GREEDY}
    expected, _ = pair.plain.post(COMPLETIONS, body)
    for params in ({"do_remote_prefill": True}, {"do_remote_decode": True}, {"prompt_token_ids": [1]}, "text", 7):
        answer, _ = pair.ours.post(COMPLETIONS, {**body, "kv_transfer_params": params})
        assert answer["choices"] == expected["choices"]
        assert answer["kv_transfer_params"] is None


def test_a_refusal_in_the_stream_leaves_nothing_on_prefill(pair: FidelityPair) -> None:
    """vLLM checks some parameters when it has already answered 200: P's blocks are free again all the same."""
    pair.refuse_alike(COMPLETIONS, {"prompt": fresh_text(300), **GREEDY, "allowed_token_ids": [99999], "stream": True})
    assert eventually(pair.deployment.prefill_is_idle, 5)


def _raw(
    server: Server, method: str, path: str, body: bytes | None, content_type: str = "application/json"
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.request(method, path, body, {"content-type": content_type})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
