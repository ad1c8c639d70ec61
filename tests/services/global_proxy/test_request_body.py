"""What of a client's body reaches the engines, and what never does."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.global_proxy.errors import InvalidRequestError
from services.global_proxy.json_shape import is_deeper_than
from services.global_proxy.request_body import (
    MAX_DEPTH,
    MAX_PROMPTS,
    MAX_STOP_STRINGS,
    NEVER_FROM_A_CLIENT,
    RequestBody,
    parse_body,
)

PARAMS = msgspec.Raw(b'{"do_remote_prefill":true}')
IDS = b"[1,2,3]"
many = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def parse(**fields: Any) -> RequestBody:
    return parse_body(json.dumps(fields).encode(), max_n=8)


def prefill(body: RequestBody, **options: bool) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(body.prefill_json({"do_remote_decode": True}, **options))
    return fields


def decode(body: RequestBody, ids: bytes | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(body.decode_json(PARAMS, ids))
    return fields


def nested(depth: int) -> bytes:
    return b'{"messages":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"request_id":"only this"}',
        b'{"prompt":NaN}',
        b'{"prompt":[1,Infinity]}',
        b'{"temperature":-Infinity}',
        b'{"prompt":"\xff"}',
        b'{"prompt":"\xed\xa0\x80"}',  # half of a surrogate pair in UTF-8
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"\\ud800\\ud800"}',
        b'{"prompt":"\0"}',
        b'\xef\xbb\xbf{"prompt":"a"}',
        '{"prompt":"a"}'.encode("utf-16"),
        b'{"n":' + b"9" * 5000 + b"}",
        b'{"n":1e999}',
        nested(MAX_DEPTH + 1),
        nested(100_000),
        b"[" * 100_000,
    ],
)
def test_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_body(raw, max_n=8)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", 8, 9),
        ("best_of", 8, 9),
        ("logprobs", 1024, 1025),
        ("top_logprobs", 1024, 1025),
        ("prompt_logprobs", 1024, 2**100),
        ("stop", ["a"] * MAX_STOP_STRINGS, ["a"] * (MAX_STOP_STRINGS + 1)),
        ("prompt", ["a]["] * MAX_PROMPTS, ["a]["] * (MAX_PROMPTS + 1)),
        ("prompt", [[1, 2]] * MAX_PROMPTS, [[1, 2]] * (MAX_PROMPTS + 1)),
        ("user", "u" * 200_000, "u" * 300_000),
    ],
)
def test_limits(name: str, good: Any, bad: Any) -> None:
    parse(**{name: good})
    with pytest.raises(InvalidRequestError, match=name) as caught:
        parse(**{name: bad})
    assert caught.value.param == name


def test_depth_counts_brackets_but_not_those_in_strings() -> None:
    parse_body(nested(MAX_DEPTH), max_n=8)
    parse(messages=[{"content": '[{"\\' * 500}] * 100)
    parse(prompt=[[1]] * 1000)


def test_last_of_equal_names_counts() -> None:
    body = parse_body(b'{"prompt":"a","n":9,"n":2,"prompt":"b"}', max_n=8)
    assert body.n == 2
    assert json.loads(body.plain_json) == {"prompt": "b", "n": 2}


def test_values_are_sent_as_they_came() -> None:
    raw = b'{"prompt":"\\u0000\\u00e9","temperature":1.00,"seed":123456789012345678901234567890}'
    assert parse_body(raw, max_n=8).plain_json == raw


def test_buffer_may_be_used_again() -> None:
    raw = bytearray(b'{"prompt":"mine"}')
    body = parse_body(raw, max_n=8)
    raw[:] = b'{"prompt":"somebody else\'s"}'
    assert body.plain_json == b'{"prompt":"mine"}'


def test_prefill_of_a_completion() -> None:
    body = parse(prompt="p", n=3, stream=True, seed=1, logprobs=2, max_tokens=9, tools=[], max_completion_tokens=4)
    assert prefill(body, want_token_ids=True) == {
        "prompt": "p",
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "min_tokens": 1,
        "ignore_eos": True,
        "n": 1,
        "stream": False,
        "tools": [],
        "return_token_ids": True,
        "kv_transfer_params": {"do_remote_decode": True},
    }
    assert "return_token_ids" not in prefill(body)


def test_prefill_of_responses() -> None:
    body = parse(
        input="p", prompt=None, text={}, include=[], max_output_tokens=7, store=True, stream=True, reasoning={}
    )
    assert prefill(body) == {
        "input": "p",
        "prompt": None,
        "reasoning": {},
        "max_output_tokens": 1,
        "ignore_eos": True,
        "stream": False,
        "background": False,
        "store": False,
        "kv_transfer_params": {"do_remote_decode": True},
    }
    assert decode(body)["max_output_tokens"] == 7
    assert body.max_new_tokens == 7


def test_token_ids_for_decode() -> None:
    completion = parse(prompt="p", messages=None)
    assert completion.takes_token_ids
    assert decode(completion, IDS) == {
        "prompt": [1, 2, 3],
        "messages": None,
        "kv_transfer_params": {"do_remote_prefill": True},
    }
    chat = parse(messages=[{"role": "user"}], prompt=None)
    assert chat.takes_token_ids
    assert decode(chat, IDS) == {
        "prompt": None,
        "messages": [{"role": "user"}],
        "kv_transfer_params": {"do_remote_prefill": True, "prompt_token_ids": [1, 2, 3]},
    }
    assert decode(chat) == json.loads(chat.plain_json) | {"kv_transfer_params": {"do_remote_prefill": True}}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "p", "echo": True},
        {"prompt": "p", "truncate_prompt_tokens": 4},
        {"prompt": "p", "prompt_embeds": "AAAA"},
        {"prompt": [1, 2]},
        {"prompt": ["a", "b"]},
        {"prompt": None},
        {"messages": [], "return_prompt_text": True},
        {"messages": [], "echo": 1},
        {"input": "p"},
    ],
)
def test_decode_needs_the_text(fields: dict[str, Any]) -> None:
    assert not parse(**fields).takes_token_ids


def test_what_others_may_know_of_it() -> None:
    body = parse(prompt=[1, 22, 333], max_tokens=5, user="me")
    assert (body.num_token_ids, body.prompt_text, body.max_new_tokens, body.session) == (3, b"[1, 22, 333]", 5, "me")
    body = parse(messages=["x"], user="me", session_id="s", max_tokens="many")
    assert (body.num_token_ids, body.prompt_text, body.max_new_tokens, body.session) == (None, b'["x"]', None, "s")


TEXTS = st.text(max_size=8) | st.text('[]{}"\\', max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | TEXTS
NAMES = st.sampled_from(
    (*NEVER_FROM_A_CLIENT, "prompt", "messages", "input", "n", "stop", "vllm_xargs", "logprobs", "max_tokens", "tools")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXTS, inner, max_size=4),
    max_leaves=12,
)
BODIES = st.dictionaries(NAMES | st.text(max_size=4), VALUES, max_size=8)


@many
@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()) | st.text().map(str.encode))
def test_nothing_but_an_invalid_request(raw: bytes) -> None:
    """Whatever the bytes: refused in the one way, or rewritten into what Python's parser, so vLLM, reads too."""
    try:
        body = parse_body(raw, max_n=8)
    except InvalidRequestError:
        return
    expected = json.loads(raw)
    for made in (body.plain_json, body.prefill_json({}), body.decode_json(PARAMS), body.decode_json(PARAMS, IDS)):
        json.loads(made)
    assert isinstance(body.takes_token_ids, bool)
    assert json.loads(body.plain_json).keys() == expected.keys() - set(NEVER_FROM_A_CLIENT)


@many
@given(BODIES, st.booleans())
def test_what_a_client_must_not_set_never_leaves(fields: dict[str, Any], escaped: bool) -> None:
    raw = json.dumps(fields)
    if escaped:
        raw = raw.replace("kv_", "\\u006bv_")
    try:
        body = parse_body(raw.encode(), max_n=8)
    except InvalidRequestError:
        return
    for made in (json.loads(body.plain_json), prefill(body), decode(body), decode(body, IDS)):
        ours = made.pop("kv_transfer_params", None)
        assert ours in (None, {"do_remote_decode": True}) or ours["do_remote_prefill"] is True
        xargs = made.get("vllm_xargs")
        for name in NEVER_FROM_A_CLIENT:
            assert name not in made
            assert not isinstance(xargs, dict) or name not in xargs


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@many
@given(VALUES, st.integers(0, 6))
def test_depth_is_exact(value: Any, most: int) -> None:
    assert is_deeper_than(json.dumps(value).encode(), most) == (depth_of(value) > most)
