"""Which requests D serves alone."""

from typing import Any

import msgspec
import pytest

from services.global_proxy.request_body import parse_body
from services.global_proxy.rules import DECODE_ONLY_RULES, decode_only_reason


def reason_for(fields: dict[str, Any]) -> str | None:
    return decode_only_reason(parse_body(msgspec.json.encode({"prompt": "p"} | fields), 8).fields)


RESPONSES: dict[str, Any] = {"prompt": None, "input": "Hi"}
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("batch", {"prompt": ["a", "b"]}),
    ("batch", {"prompt": ['a"\\,', "b"]}),
    ("batch", {"prompt": [[1, 2], [3]]}),
    ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("echo_logprobs", {"echo": True, "logprobs": 0}),
    ("echo_logprobs", {"echo": True, "messages": []}),
    ("beam_search", {"use_beam_search": True}),
    ("prompt_embeds", {"prompt_embeds": "AAAA"}),
    ("truncation", {"truncate_prompt_tokens": -1}),
    ("truncation", RESPONSES | {"truncation": "auto"}),
    ("stateful", RESPONSES | {"previous_response_id": "resp_1"}),
    ("stateful", RESPONSES | {"background": True}),
    ("server_tools", RESPONSES | {"tools": [{"type": "function"}, {"type": "web_search"}]}),
    ("server_tools", RESPONSES | {"tools": "all"}),
    ("invalid", {"n": 0}),
    ("invalid", {"n": True}),
    ("invalid", {"max_tokens": -1}),
    ("invalid", {"max_completion_tokens": "many"}),
    ("invalid", {"max_output_tokens": 0.5}),
]


@pytest.mark.parametrize(("reason", "fields"), EXAMPLES)
def test_decode_serves_alone(reason: str, fields: dict[str, Any]) -> None:
    assert reason_for(fields) == reason


def test_every_rule_has_an_example() -> None:
    assert {name for name, _ in DECODE_ONLY_RULES} == {reason for reason, _ in EXAMPLES}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a,b"]},
        {"prompt": [[1, 2]]},
        {"prompt": [1, 2, 3]},
        {"prompt": []},
        {"echo": True},
        {"logprobs": 1},
        {"prompt_logprobs": None, "use_beam_search": False, "prompt_embeds": None, "echo": False},
        {"truncate_prompt_tokens": 5},
        RESPONSES | {"tools": [{"type": "function"}], "truncation": "disabled", "background": False},
        RESPONSES | {"tools": None},
        {"messages": [], "tools": [{"type": "web_search"}]},
    ],
)
def test_one_handoff_is_enough(fields: dict[str, Any]) -> None:
    assert reason_for(fields) is None
