"""What policies are told of a prompt."""

import json
from typing import Any

import pytest

from services.global_proxy.prompt_of import PromptReader
from services.global_proxy.request_body import RequestBody, parse_body


def body(**fields: Any) -> RequestBody:
    return parse_body(json.dumps(fields).encode(), max_n=8)


def test_token_ids_are_counted() -> None:
    prompt = PromptReader().read(body(prompt=[5, 6, 7], max_tokens=10), None)
    assert (prompt.num_tokens, prompt.max_new_tokens, prompt.text) == (3, 10, b"[5, 6, 7]")


def test_text_is_estimated_from_what_was_counted() -> None:
    reader, text = PromptReader(), "x" * 400
    first = reader.read(body(prompt=text), None)
    assert 90 <= first.num_tokens <= 110
    for _ in range(200):
        reader.learn(reader.read(body(prompt=text), None), 200)
    assert 190 <= reader.read(body(prompt=text), None).num_tokens <= 210


def test_what_was_counted_is_the_prompts_size() -> None:
    reader = PromptReader()
    prompt = reader.read(body(prompt="Hello"), None)
    reader.learn(prompt, 17)
    assert prompt.num_tokens == 17


def test_short_texts_teach_nothing() -> None:
    """Of them a chat template is most."""
    reader, text = PromptReader(), "x" * 400
    before = reader.read(body(prompt=text), None).num_tokens
    for _ in range(100):
        reader.learn(reader.read(body(prompt="Hi"), None), 30)
    assert reader.read(body(prompt=text), None).num_tokens == before


def test_no_prompt_is_empty() -> None:
    assert PromptReader().read(body(prompt="", messages=None), None).num_tokens >= 1
    assert PromptReader().read(body(model="m"), None).num_tokens == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 256), ({"max_tokens": 0}, 0), ({"max_tokens": 2**40}, 256), ({"max_completion_tokens": 5, "n": 3}, 15)],
)
def test_new_tokens(fields: dict[str, Any], expected: int) -> None:
    assert PromptReader().read(body(prompt="a", **fields), None).max_new_tokens == expected


def test_sessions() -> None:
    reader = PromptReader()
    assert reader.read(body(prompt="a"), None).session is None
    assert reader.read(body(prompt="a", user="é"), None).session == "é".encode()
    assert reader.read(body(prompt="a", user="é"), b"header").session == b"header"
