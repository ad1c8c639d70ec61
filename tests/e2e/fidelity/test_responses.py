"""/v1/responses through the proxy and directly against plain vLLM."""

from typing import Any

import openai
import pytest

from tests.e2e.fidelity.normalise import comparable, differences
from tests.e2e.fidelity.pair import MODEL, FidelityPair, fresh_text
from tests.e2e.prompts import BLOCK_SIZE

pytestmark = pytest.mark.engine

RESPONSES = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"born": {"type": "boolean"}}, "required": ["born"]}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]},
}


def asked(**more: Any) -> dict[str, Any]:
    return {"input": fresh_text(), "max_output_tokens": 8, "temperature": 0, **more}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"instructions": "You are brief."},
        {"input": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]},
        {"temperature": 1.0, "seed": 4},
        {"top_p": 0.5, "temperature": 0.7, "seed": 1},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"text": {"format": {"type": "json_schema", "name": "p", "schema": SCHEMA}}, "max_output_tokens": 30},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 60},
        {"metadata": {"a": "b"}, "user": "ada", "store": True},
        {"truncation": "auto"},
        {"stop": ["a", "e"], "max_output_tokens": 30},
    ],
    ids=str,
)
def test_a_parameter(pair: FidelityPair, more: dict[str, Any]) -> None:
    body = asked(**more)
    pair.agree(RESPONSES, body)
    ours, theirs = (_streamed(side.client, body) for side in (pair.ours, pair.plain))
    assert differences(comparable(ours), comparable(theirs)) == []


def test_a_long_prompt_is_computed_on_prefill(pair: FidelityPair) -> None:
    """And the prefix cache's share is told as a plain server would tell it."""
    body = asked(input=fresh_text(3 * BLOCK_SIZE + 40))
    for expected in (0, 3 * BLOCK_SIZE):
        answer = pair.agree(RESPONSES, body, way="disaggregated")
        assert answer["usage"]["input_tokens_details"]["cached_tokens"] == expected
        assert answer["kv_transfer_params"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"input": None},
        {"input": 7},
        {"max_output_tokens": 0},
        {"max_output_tokens": "many"},
        {"temperature": -1},
        {"previous_response_id": "resp_of_nobody"},
        {"background": True},
        {"tool_choice": "nonsense"},
        {"text": {"format": {"type": "nonsense"}}},
        {"input": "x" * 5000},
    ],
    ids=lambda change: str(change)[:60],
)
def test_what_is_refused(pair: FidelityPair, change: dict[str, Any]) -> None:
    pair.refuse_alike(RESPONSES, asked(**change))


def test_answers_that_nobody_kept(pair: FidelityPair) -> None:
    """The engines keep none unless they are told to; then they say so."""
    for side in (pair.ours, pair.plain):
        with pytest.raises(openai.NotFoundError):
            side.client.responses.retrieve("resp_of_nobody")
        with pytest.raises(openai.NotFoundError):
            side.client.responses.cancel("resp_of_nobody")


def _streamed(client: openai.OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """The last event, the text put together, and which kinds of event came, without the number of pieces."""
    kinds: list[str] = []
    text = ""
    last: dict[str, Any] = {}
    with client.responses.create(model=MODEL, stream=True, extra_body=body) as stream:
        for number, event in enumerate(stream):
            last = event.to_dict(mode="json")
            assert last.pop("sequence_number") == number
            if not kinds or kinds[-1] != event.type:
                kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
    return {"kinds": kinds, "text": text, "last": last}
