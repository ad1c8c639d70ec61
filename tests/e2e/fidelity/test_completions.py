"""/v1/completions through the proxy and directly against plain vLLM."""

import re
from typing import Any

import pytest

from tests.e2e.deployments import eventually
from tests.e2e.equality import COMPLETIONS
from tests.e2e.fidelity.pair import GREEDY, FidelityPair, fresh_text

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 30},
        {"logprobs": 0},
        {"logprobs": 3},
        {"logprobs": 2, "return_tokens_as_token_ids": True},
        {"echo": True},
        {"echo": True, "max_tokens": 1},
        {"echo": True, "logprobs": 2},
        {"return_token_ids": True},
        {"echo": True, "return_token_ids": True},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 11},
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "max_tokens": 30},
        {"logit_bias": {"65": 100}},
        {"allowed_token_ids": [65, 66, 67]},
        {"bad_words": ["A", "BC"], "max_tokens": 20},
        {"min_tokens": 6, "stop_token_ids": [65, 66, 67]},
        {"ignore_eos": True, "max_tokens": 20},
        {"structured_outputs": {"regex": "(yes|no) [0-9]{3}"}, "max_tokens": 20},
        {"structured_outputs": {"choice": ["north", "south"]}, "max_tokens": 20},
        {"truncate_prompt_tokens": 20},
        {"truncate_prompt_tokens": -1},
        {"stream_options": None, "suffix": None, "user": "ada"},
    ],
    ids=str,
)
def test_a_parameter(pair: FidelityPair, more: dict[str, Any]) -> None:
    pair.agree_both_ways(COMPLETIONS, {"prompt": fresh_text(), **GREEDY, **more})


@pytest.mark.parametrize("prompt", [[72, 101, 108], [[72, 101], [108, 108, 111]], ["One", "Two", "Three"], ["One"]])
def test_a_kind_of_prompt(pair: FidelityPair, prompt: list[Any]) -> None:
    pair.agree_both_ways(COMPLETIONS, {"prompt": prompt, **GREEDY, "logprobs": 1, "return_token_ids": True})


def test_several_choices_of_several_prompts(pair: FidelityPair) -> None:
    body = {"prompt": [fresh_text(), fresh_text()], "n": 2, "temperature": 1.0, "seed": 1, "max_tokens": 6}
    answer = pair.agree(COMPLETIONS, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    pair.agree_streamed(COMPLETIONS, body)


def test_stop_strings_wherever_they_lie(pair: FidelityPair) -> None:
    body = {"prompt": fresh_text(), "max_tokens": 24, "temperature": 0}
    text = pair.agree(COMPLETIONS, body)["choices"][0]["text"]
    assert len(text) > 12
    for stop in (text[0], text[0:4], text[5:8], [text[9:12], text[5:7]], ["never"], []):
        for more in ({}, {"include_stop_str_in_output": True}):
            pair.agree_both_ways(COMPLETIONS, {**body, "stop": stop, **more})


def test_text_of_split_characters(pair: FidelityPair) -> None:
    """A character of three tokens is held back until it is whole, and what is not whole at the end is not said."""
    for regex, max_tokens in (("(你好 ?){3}", 14), ("🙂+", 7), ("naïve", 6)):
        body = {"prompt": fresh_text(), **GREEDY, "max_tokens": max_tokens, "structured_outputs": {"regex": regex}}
        pair.agree_both_ways(COMPLETIONS, {**body, "return_token_ids": True})
        pair.agree_both_ways(COMPLETIONS, {**body, "logprobs": 1})


def test_a_long_prompt_is_computed_on_prefill(pair: FidelityPair) -> None:
    body = {"prompt": fresh_text(1000), **GREEDY}
    pair.agree(COMPLETIONS, body, way="disaggregated")
    pair.agree_streamed(COMPLETIONS, {**body, "prompt": fresh_text(1000)})
    assert eventually(pair.deployment.prefill_is_idle, 10)


def test_prompt_logprobs(pair: FidelityPair) -> None:
    pair.agree(COMPLETIONS, {"prompt": fresh_text(), **GREEDY, "prompt_logprobs": 2})
    # Streamed, vLLM answers this one with an error event: the prompt's are gone when the second choice asks for them.
    several = {"n": 2, "temperature": 1.0, "seed": 5, "logprobs": 1, "echo": True}
    pair.agree(COMPLETIONS, {"prompt": fresh_text(), **GREEDY, **several})


def test_beam_search(pair: FidelityPair) -> None:
    pair.agree(COMPLETIONS, {"prompt": fresh_text(), "max_tokens": 4, "n": 2, "use_beam_search": True})


def test_every_line_of_a_stream_but_its_names(pair: FidelityPair) -> None:
    """Byte for byte: the proxy changes nothing of what D writes."""
    body = {"model": "test-model", "prompt": fresh_text(), "max_tokens": 1, "temperature": 0, "stream": True}
    lines = []
    for side in (pair.ours, pair.plain):
        with side.server.open(COMPLETIONS, {**body, "stream_options": {"include_usage": True}}) as response:
            text = response.read().decode()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines.append(_without_names(text))
    assert lines[0] == lines[1]


def _without_names(text: str) -> str:
    text = re.sub(r'"(id|system_fingerprint)":"[^"]*"', r'"\1":""', text)
    return re.sub(r'"created":\d+', '"created":0', text)
