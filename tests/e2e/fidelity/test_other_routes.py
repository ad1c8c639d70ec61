"""The routes beside completions, and the client's own name for a request."""

import json
import uuid
from typing import Any

import openai
import pytest

from tests.e2e.equality import CHAT, COMPLETIONS
from tests.e2e.fidelity.pair import GREEDY, MODEL, FidelityPair, fresh_text

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Hello, 世界"}]


def test_models(pair: FidelityPair) -> None:
    lists = []
    for side in (pair.ours, pair.plain):
        models = [model.to_dict(mode="json") for model in side.client.models.list()]
        for model in models:
            for permission in model["permission"]:  # type: ignore[attr-defined]
                permission.pop("id")
                permission.pop("created")
            model.pop("created")
        lists.append(models)
    assert lists[0] == lists[1]
    assert [model["id"] for model in lists[0]] == [MODEL]


def test_version(pair: FidelityPair) -> None:
    ours, theirs = (json.loads(side.server.get("/version")) for side in (pair.ours, pair.plain))
    assert ours == theirs


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Hello, 世界 🙂"},
        {"prompt": "Hello", "add_special_tokens": False},
        {"prompt": "Hello", "return_token_strs": True},
        {"prompt": ""},
        {"messages": MESSAGES},
        {"messages": MESSAGES, "add_generation_prompt": False, "continue_final_message": False},
        {"messages": MESSAGES, "return_token_strs": True},
    ],
    ids=str,
)
def test_tokenize(pair: FidelityPair, body: dict[str, Any]) -> None:
    answer = pair.agree("/tokenize", body)
    assert answer["count"] == len(answer["tokens"])


def test_detokenize(pair: FidelityPair) -> None:
    text = "Hello, 世界 🙂"
    tokens = pair.agree("/tokenize", {"prompt": text})["tokens"]
    assert pair.agree("/detokenize", {"tokens": tokens})["prompt"] == text
    pair.agree("/detokenize", {"tokens": tokens[:-1]})
    pair.agree("/detokenize", {"tokens": []})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": "another", "prompt": "a"}),
        ("/tokenize", {"prompt": 7}),
        ("/tokenize", {"messages": "a"}),
        ("/tokenize", {}),
        ("/detokenize", {"model": "another", "tokens": [1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ],
    ids=str,
)
def test_what_they_refuse(pair: FidelityPair, path: str, body: dict[str, Any]) -> None:
    pair.refuse_alike(path, body)


def test_embeddings_of_a_model_that_has_none(pair: FidelityPair) -> None:
    """An engine that generates has no such route."""
    for side in (pair.ours, pair.plain):
        with pytest.raises(openai.NotFoundError):
            side.client.embeddings.create(model=MODEL, input="Hello")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_id_is_given_back(pair: FidelityPair, path: str) -> None:
    """Ours, and the same for two requests at once, which are none the less two requests."""
    prompt: dict[str, Any] = {"prompt": fresh_text()} if path == COMPLETIONS else {"messages": MESSAGES}
    name = f"mine-{uuid.uuid4()}"
    answers = []
    for _ in range(2):
        with pair.ours.server.open(path, {"model": MODEL, **prompt, **GREEDY}, {"X-Request-Id": name}) as response:
            assert response.headers["x-request-id"] == name
            answers.append(json.load(response))
    assert answers[0]["id"] != answers[1]["id"]
    assert answers[0]["choices"] == answers[1]["choices"] == pair.agree(path, {**prompt, **GREEDY})["choices"]


def test_health_and_liveness(pair: FidelityPair) -> None:
    for path in ("/health", "/live"):
        assert json.loads(pair.ours.server.get(path))["status"] == "ok"
    assert "# HELP" in pair.ours.server.get("/metrics")
