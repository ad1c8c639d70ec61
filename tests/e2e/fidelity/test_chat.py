"""/v1/chat/completions through the proxy and directly against plain vLLM."""

from typing import Any

import pytest

from tests.e2e.equality import CHAT
from tests.e2e.fidelity.normalise import comparable, differences
from tests.e2e.fidelity.pair import GREEDY, MODEL, FidelityPair, fresh_text

pytestmark = pytest.mark.engine

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather somewhere",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"born": {"type": "boolean"}, "name": {"enum": ["Ada", "Grace"]}},
    "required": ["born", "name"],
    "additionalProperties": False,
}


def asked(**more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": fresh_text()}]
    return {"messages": messages, **GREEDY, **more}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": None, "max_completion_tokens": 5},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 3},
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"n": 2, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 1},
        {"temperature": 0.7, "top_p": 0.9, "seed": 11},
        {"stop": ["a", "the"], "max_tokens": 30},
        {"return_token_ids": True},
        {"return_token_ids": True, "stop": ["never"]},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 30},
        {"logit_bias": {"65": 100}},
        {"return_prompt_text": True},
        {"add_generation_prompt": False, "continue_final_message": False},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"choice": ["north", "south"]}, "max_tokens": 20},
        {"structured_outputs": {"regex": "(你好 ?){3}"}, "max_tokens": 14, "return_token_ids": True},
        {"structured_outputs": {"regex": "(你好 ?){3}"}, "max_tokens": 14},
    ],
    ids=str,
)
def test_a_parameter(pair: FidelityPair, more: dict[str, Any]) -> None:
    pair.agree_both_ways(CHAT, asked(**more))


def test_echo(pair: FidelityPair) -> None:
    """The last message is said again, which is the assistant's if the answer goes on with it."""
    messages = [{"role": "user", "content": fresh_text()}, {"role": "assistant", "content": "Once upon"}]
    more = {"echo": True, "add_generation_prompt": False, "continue_final_message": True}
    pair.agree_both_ways(CHAT, asked(messages=messages, **more))


def test_content_in_parts(pair: FidelityPair) -> None:
    parts = [{"type": "text", "text": fresh_text()}, {"type": "text", "text": "and more"}]
    pair.agree_both_ways(CHAT, asked(messages=[{"role": "user", "content": parts}]))


@pytest.mark.parametrize(
    "choice",
    ["none", "auto", "required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["none", "auto", "required", "named"],
)
def test_tools(pair: FidelityPair, choice: Any) -> None:
    no_spaces = {str(ord(space)): -100 for space in " \t\r\n"}  # the model is random, and would write nothing else
    body = asked(tools=TOOLS, tool_choice=choice, max_tokens=120, logit_bias=no_spaces)
    answer = pair.agree(CHAT, body)
    streamed = pair.agree_streamed(CHAT, body)
    for message in (answer["choices"][0]["message"], streamed["choices"][0]["delta"]):
        calls = message.get("tool_calls") or []
        assert len(calls) == 0 if choice in ("none", "auto") else len(calls) > 0
        assert {call["function"]["name"] for call in calls} <= {"get_weather"}


def test_a_conversation_with_tool_results(pair: FidelityPair) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": fresh_text()},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
    ]
    pair.agree_both_ways(CHAT, asked(messages=messages, tools=TOOLS))


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
        {"type": "json_object"},
    ],
    ids=["json_schema", "json_object"],
)
def test_structured_output(pair: FidelityPair, response_format: dict[str, Any]) -> None:
    pair.agree_both_ways(CHAT, asked(response_format=response_format, max_tokens=40))


def test_the_clients_own_methods(pair: FidelityPair) -> None:
    """As users call it: types, iteration and an own id for the request."""
    messages: Any = [{"role": "user", "content": fresh_text(400)}]
    said = []
    for side in (pair.ours, pair.plain):
        chat = side.client.chat.completions
        headers = {"X-Request-Id": "mine"}
        whole = chat.create(model=MODEL, messages=messages, **GREEDY, extra_headers=headers)  # type: ignore[call-overload]
        with chat.create(model=MODEL, messages=messages, **GREEDY, stream=True) as stream:  # type: ignore[call-overload]
            streamed = "".join(event.choices[0].delta.content or "" for event in stream)
        assert whole.choices[0].message.content == streamed
        assert whole.id.startswith("chatcmpl-")
        said.append([whole.to_dict(mode="json"), streamed])
    assert differences(comparable(said[0]), comparable(said[1])) == []
