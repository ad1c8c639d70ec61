"""What every topology must do: answer like one plain vLLM server. Test modules inherit and provide the fixtures.

Fixtures: `served` (a Server: the proxy), `plain` (a Server: plain vLLM), `texts` (the prompts).
"""

from typing import Any

import pytest

from tests.e2e.deployments import Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def completion(prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "test-model",
        "prompt": prompt,
        "max_tokens": 16,
        "temperature": 0,
        "return_token_ids": True,
        **more,
    }


def chat(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": text}]
    return {"model": "test-model", "messages": messages, "max_tokens": 16, "temperature": 0, **more}


def choices(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What must be equal of an answer's choices, by index."""
    return sorted(
        (c["index"], c.get("text"), c.get("token_ids"), (c.get("message") or {}).get("content"), c["finish_reason"])
        for c in answer["choices"]
    )


def joined(events: list[dict[str, Any]]) -> dict[int, tuple[str, str | None]]:
    """A stream's text and finish reason for each choice."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for event in events:
        for c in event["choices"]:
            piece = c["text"] if "text" in c else c["delta"].get("content") or ""
            texts[c["index"]] = texts.get(c["index"], "") + piece
            reasons[c["index"]] = c["finish_reason"] or reasons.get(c["index"])
    return {index: (text, reasons[index]) for index, text in texts.items()}


class AnswersLikePlainVllm:
    """Greedy answers, and sampled ones with a seed, are those of one plain vLLM server."""

    def test_greedy_tokens_of_every_prompt(self, served: Server, plain: Server, texts: list[str]) -> None:
        assert len(texts) == 20
        for text in texts:
            body = completion(text)
            ours, theirs = served.post(COMPLETIONS, body), plain.post(COMPLETIONS, body)
            assert choices(ours) == choices(theirs), text[:60]
            assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
            assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]

    def test_chat(self, served: Server, plain: Server, texts: list[str]) -> None:
        for text in texts[:6]:
            assert choices(served.post(CHAT, chat(text))) == choices(plain.post(CHAT, chat(text)))

    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    def test_streams(self, served: Server, plain: Server, texts: list[str], path: str) -> None:
        for text in texts[3:7]:
            body = (completion if path == COMPLETIONS else chat)(text, stream_options={"include_usage": True})
            ours, theirs = served.stream(path, body), plain.stream(path, body)
            assert joined(ours) == joined(theirs)
            assert ours[-1]["usage"] == theirs[-1]["usage"]

    def test_several_choices(self, served: Server, plain: Server, texts: list[str]) -> None:
        for text in (texts[0], texts[16]):
            body = completion(text, n=3, temperature=1.0, seed=7)
            ours = served.post(COMPLETIONS, body)
            assert len(ours["choices"]) == 3
            assert choices(ours) == choices(plain.post(COMPLETIONS, body))

    def test_stop(self, served: Server, plain: Server, texts: list[str]) -> None:
        text = texts[0]
        whole = plain.post(COMPLETIONS, completion(text))["choices"][0]["text"]
        for stop in (whole[:1], whole[3:5]):
            ours = served.post(COMPLETIONS, completion(text, stop=[stop]))
            assert choices(ours) == choices(plain.post(COMPLETIONS, completion(text, stop=[stop])))
            assert ours["choices"][0]["finish_reason"] == "stop"

    def test_logprobs(self, served: Server, plain: Server, texts: list[str]) -> None:
        for text in (texts[0], texts[16]):
            body = completion(text, logprobs=2)
            ours = served.post(COMPLETIONS, body)["choices"][0]["logprobs"]
            theirs = plain.post(COMPLETIONS, body)["choices"][0]["logprobs"]
            assert ours["tokens"] == theirs["tokens"]
            assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)

    def test_seeded_sampling(self, served: Server, plain: Server, texts: list[str]) -> None:
        for seed, text in enumerate(texts[:4]):
            body = completion(text, temperature=0.8, top_p=0.9, seed=seed)
            assert choices(served.post(COMPLETIONS, body)) == choices(plain.post(COMPLETIONS, body))

    def test_token_ids_as_prompt(self, served: Server, plain: Server, texts: list[str]) -> None:
        ids = plain.post("/tokenize", {"model": "test-model", "prompt": texts[15]})["tokens"]
        body = {**completion(""), "prompt": ids}
        assert choices(served.post(COMPLETIONS, body)) == choices(plain.post(COMPLETIONS, body))

    def test_batch_of_prompts(self, served: Server, plain: Server, texts: list[str]) -> None:
        body = {**completion(""), "prompt": texts[:3]}
        assert choices(served.post(COMPLETIONS, body)) == choices(plain.post(COMPLETIONS, body))
