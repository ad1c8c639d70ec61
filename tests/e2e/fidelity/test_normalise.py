"""The comparison itself: it would be worth nothing if it let a difference pass."""

from typing import Any

import pytest

from tests.e2e.fidelity.normalise import comparable, differences, folded

ANSWER: dict[str, Any] = {
    "id": "cmpl-1",
    "created": 17,
    "model": "m",
    "choices": [{"index": 0, "text": "abc", "token_ids": [1, 2], "logprobs": {"token_logprobs": [-0.5]}}],
    "usage": {"prompt_tokens": 3, "prompt_tokens_details": None},
}


def test_what_must_differ_may_differ() -> None:
    other = {**ANSWER, "id": "cmpl-2", "created": 18}
    assert differences(comparable(ANSWER), comparable(other)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"model": "other"},
        {"more": None},
        {"choices": []},
        {"choices": [{**ANSWER["choices"][0], "text": "abd"}]},
        {"choices": [{**ANSWER["choices"][0], "token_ids": [1, 3]}]},
        {"choices": [{**ANSWER["choices"][0], "index": False}]},
        {"choices": [{**ANSWER["choices"][0], "logprobs": {"token_logprobs": [-0.52]}}]},
        {"choices": [{**ANSWER["choices"][0], "logprobs": {"token_logprobs": [None]}}]},
        {"usage": {"prompt_tokens": 3}},
        {"usage": {"prompt_tokens": 4, "prompt_tokens_details": None}},
    ],
)
def test_anything_else_is_a_difference(change: dict[str, Any]) -> None:
    assert len(differences(comparable({**ANSWER, **change}), comparable(ANSWER))) == 1


def test_streams_are_compared_whatever_the_size_of_their_events() -> None:
    def event(text: str, ids: list[int], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"content": text}, "token_ids": ids, "finish_reason": None, **more}
        return {"id": "a", "model": "m", "created": 1, "object": "chunk", "choices": [choice]}

    first = event("", [], delta={"role": "assistant", "content": ""})
    by_token = [first, event("a", [1]), event("b", [2]), event("c", [3], finish_reason="length")]
    at_once = [first, event("abc", [1, 2, 3], finish_reason="length")]
    assert folded(by_token) == folded(at_once)
    assert folded(by_token)["choices"][0]["delta"] == {"role": "assistant", "content": "abc"}
    assert folded(by_token[:-1]) != folded(by_token)
    with pytest.raises(AssertionError, match="several answers"):
        folded([by_token[0], {**by_token[1], "id": "b"}])
