"""What was counted: usage, while it streams and at its end, and what came out of the prefix cache."""

from typing import Any

import pytest

from tests.e2e.equality import CHAT, COMPLETIONS
from tests.e2e.fidelity.pair import GREEDY, MODEL, FidelityPair, fresh_text
from tests.e2e.prompts import BLOCK_SIZE

pytestmark = pytest.mark.engine

PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


def asked(path: str, text: str, **more: Any) -> dict[str, Any]:
    prompt: Any = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    return {**prompt, **GREEDY, **more}


@PATHS
@pytest.mark.parametrize("include_usage", [True, False, None])
@pytest.mark.parametrize("continuous_usage_stats", [True, False, None])
@pytest.mark.parametrize("n", [1, 2])
def test_stream_options(
    pair: FidelityPair, path: str, include_usage: bool | None, continuous_usage_stats: bool | None, n: int
) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": continuous_usage_stats}
    given = {name: value for name, value in options.items() if value is not None}
    more: dict[str, Any] = {"stream_options": given, "n": n, "temperature": 1.0, "seed": 9}
    pair.agree_streamed(path, asked(path, fresh_text(), **more))


@PATHS
def test_each_event_counts_the_tokens_so_far(pair: FidelityPair, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, **asked(path, fresh_text(), stream_options=options, return_token_ids=True)}
    for side in (pair.ours, pair.plain):
        num_tokens = 0
        *events, last = side.events(path, body)
        for event in events:
            num_tokens += len(event["choices"][0].get("token_ids") or ())
            usage = event["usage"]
            assert usage["completion_tokens"] == num_tokens
            assert usage["total_tokens"] == usage["prompt_tokens"] + num_tokens
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == num_tokens == GREEDY["max_tokens"]


@PATHS
@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_those_of_the_prompt(pair: FidelityPair, path: str, stream: bool) -> None:
    """Of a prompt seen before: its whole blocks, as a plain server says, though D got all of it over the network."""
    text = fresh_text(3 * BLOCK_SIZE + 40)
    body = asked(path, text, **({"stream_options": {"include_usage": True}} if stream else {}))
    ask = pair.agree_streamed if stream else pair.agree
    for expected in (0, 3 * BLOCK_SIZE):
        details = ask(path, body)["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] == expected


@PATHS
def test_cached_tokens_of_a_longer_prompt(pair: FidelityPair, path: str) -> None:
    """A conversation goes on: what it shares with its last turn was cached."""
    start = fresh_text(2 * BLOCK_SIZE + 1)
    pair.agree(path, asked(path, start))
    usage = pair.agree(path, asked(path, start + " and then" * 40))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2 * BLOCK_SIZE
