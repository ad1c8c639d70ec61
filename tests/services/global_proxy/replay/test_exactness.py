"""Bodies as they come over the wire: most fields are not decoded when they are looked at."""

import json
from typing import Any

import pytest

from services.global_proxy.replay.exactness import why_not_exact
from services.global_proxy.request_body import parse_body

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello", "stream": True}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
TOOL = {"type": "function", "function": {"name": "f"}}


def why(fields: dict[str, Any], body: dict[str, Any] = COMPLETION) -> str | None:
    return why_not_exact(parse_body(json.dumps(body | fields).encode(), max_n=128))


@pytest.mark.parametrize("body", [COMPLETION, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "best_of": None, "use_beam_search": False},
        {"max_tokens": 5, "max_completion_tokens": None, "min_tokens": 0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": None},
        {"temperature": 0, "seed": 7},
        {"temperature": 0.0, "seed": 0},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "bad_words": [], "vllm_xargs": {}},
        {"presence_penalty": None, "frequency_penalty": None, "bad_words": None, "vllm_xargs": None},
        {"stop": None},
        {"stop": []},
        {"stop": "."},
        {"stop": ["\n", "☂"], "stop_token_ids": [5], "include_stop_str_in_output": True},
        {"response_format": None, "structured_outputs": None, "tools": None, "tool_choice": None},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL] * 200, "tool_choice": "none"},
        {"logit_bias": {"5": 1.5}, "allowed_token_ids": [1, 2], "ignore_eos": True, "cache_salt": "s", "priority": 3},
        {"echo": False, "return_token_ids": False, "return_prompt_text": None, "prompt_logprobs": None},
        {"skip_special_tokens": True, "logprobs": None, "top_logprobs": 0, "routed_experts_prompt_start": 0},
        {"stream_options": {"include_usage": True}, "user": "u", "metadata": {"x": 1}, "prompt_embeds": None},
    ],
)
def test_exact(fields: dict[str, Any], body: dict[str, Any]) -> None:
    assert why(fields, body) is None


@pytest.mark.parametrize("body", [COMPLETION, CHAT])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (2, True, "1", 1.0)),
        ("best_of", 2),
        ("use_beam_search", True),
        *(("max_tokens", value) for value in ("20", 16.0, True)),
        *(("min_tokens", value) for value in ("20", 16.0, True)),
        ("max_completion_tokens", "7"),
        *(("presence_penalty", value) for value in (0.1, -2, "0.5")),
        ("frequency_penalty", 1e-3),
        ("bad_words", ["two words"]),
        ("vllm_xargs", {"x": 1}),
        ("logits_processors", ["x"]),
        *(("structured_outputs", value) for value in ({}, {"regex": "a"})),
        *(("response_format", value) for value in ({"type": "json_object"}, {}, "text", {"type": "text" * 2000})),
        *((name, 0) for name in ("thinking_token_budget", "repetition_detection", "watermarking", "prompt_logprobs")),
        ("truncate_prompt_tokens", 0),
        ("logprob_token_ids", []),
        *(("stop", value) for value in ("ab", ["a", "bc"], "", 5, ["e\u0301"])),
        *(("skip_special_tokens", value) for value in (False, 0, "false")),
        *((name, True) for name in ("echo", "return_prompt_text", "return_token_ids", "return_tokens_as_token_ids")),
        *((name, True) for name in ("return_token_offsets", "return_mm_kwargs", "logprobs")),
        ("top_logprobs", 1),
        ("routed_experts_prompt_start", 1),
        ("prompt_embeds", "AAAA"),
        ("input", "Hello"),
        *(("seed", value) for value in (0, 7, "7")),
        ("bad_words", ["x" * 10000]),
    ],
)
def test_not_exact(name: str, value: Any, body: dict[str, Any]) -> None:
    assert why({name: value}, body) == name


@pytest.mark.parametrize("temperature", [0.7, 1e-9, None, "0", False])
def test_a_seed_matters_unless_nothing_is_drawn(temperature: Any) -> None:
    assert why({"seed": 7, "temperature": temperature}) == "seed"


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function"}, None])
def test_tool_calls_are_parsed(choice: Any) -> None:
    assert why({"tools": [TOOL], "tool_choice": choice}, CHAT) == "tools"


def test_a_tool_choice_without_tools() -> None:
    assert why({"tool_choice": "auto"}, CHAT) == "tools"


def test_log_probabilities_of_a_completion_may_be_those_of_the_drawn_tokens_alone() -> None:
    assert why({"logprobs": 0}) == "logprobs"
    assert why({"logprobs": False}) == "logprobs"
    assert why({"logprobs": False}, CHAT) is None


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [1, 2, 3], [[1, 2, 3]]])
def test_one_prompt(prompt: Any) -> None:
    assert why({"prompt": prompt}) is None


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], None])
def test_not_one_prompt(prompt: Any) -> None:
    assert why({"prompt": prompt}) == "prompt"


def test_the_path_would_decide_which_of_two_prompts_counts() -> None:
    assert why({"prompt": "Hello"}, CHAT) == "prompt"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "see [this](image_url)",
        [{"type": "text", "text": "image_url"}],
        [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "refusal", "refusal": "no"}],
    ],
)
def test_text(content: Any) -> None:
    assert why({"messages": [{"role": "user", "content": "Hello"}, {"role": "user", "content": content}]}, CHAT) is None


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "data:,"}}],
        [{"image_url": "data:,"}],
        [{"type": "text", "text": "a", "image_url": {"url": "data:,"}}],
        [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}],
        ["text"],
        [{"type": 7}],
        {"type": "text", "a": []},
    ],
)
def test_images_and_sound_have_no_token_ids(content: Any) -> None:
    assert why({"messages": [{"role": "user", "content": content}]}, CHAT) == "messages"
