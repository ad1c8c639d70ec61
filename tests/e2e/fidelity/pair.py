"""Two servers that are asked the same thing: the proxy before P and D of ours, and one plain vLLM server.

Both are asked with the `openai` client, as most users of theirs would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import httpx
import openai
from openai._types import RequestOptions
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from tests.e2e.deployments import ANSWER_TIMEOUT_S, Deployment, Server
from tests.e2e.equality import CHAT, COMPLETIONS
from tests.e2e.fidelity.normalise import comparable, differences, folded

MODEL = "test-model"
PATH_HEADER = "x-omni-path"  # of the proxy's answers: whether P had a part in it
GREEDY = {"max_tokens": 8, "temperature": 0}

Body = dict[str, Any]
_STREAMS: dict[str, type[openai.Stream[Any]]] = {
    COMPLETIONS: openai.Stream[Completion],
    CHAT: openai.Stream[ChatCompletionChunk],
}
_numbers = count()


def fresh_text(num_tokens: int = 40) -> str:
    """So many tokens (bytes), beginning like no other prompt, so that no prefix cache has them."""
    return (f"{next(_numbers):04d} " + "tell me a tale of the sea, " * (1 + num_tokens // 27))[:num_tokens]


@dataclass(frozen=True)
class Refusal:
    """What the `openai` client makes of an error.

    Attributes:
        status: None for an event of a stream.
        body: type, message, param and code.
    """

    exception: str
    status: int | None
    body: Any


@dataclass(frozen=True)
class Answerer:
    """One of the two."""

    server: Server
    client: openai.OpenAI

    def post(self, path: str, body: Body, headers: dict[str, str] | None = None) -> tuple[dict[str, Any], str | None]:
        """The JSON answer, and which way it came. Raises openai.APIStatusError."""
        response = self._ask(path, body, headers)
        answer: dict[str, Any] = response.json()
        return answer, response.headers.get(PATH_HEADER)

    def events(self, path: str, body: Body) -> list[dict[str, Any]]:
        """A stream's events, as the client's own types give them back. Raises openai.APIError."""
        streamed = {**body, "stream": True}
        with self.client.post(
            self.server.url + path, body=streamed, cast_to=object, stream=True, stream_cls=_STREAMS[path]
        ) as stream:
            return [event.to_dict(mode="json") for event in stream]

    def refusal(self, path: str, body: Body) -> Refusal:
        """How it refuses; fails if it does not. Some errors of a stream come as its only event."""
        try:
            answer = self.events(path, body) if body.get("stream") else self._ask(path, body, None).json()
        except openai.APIError as error:
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            return Refusal(type(error).__name__, status, error.body)
        raise AssertionError(f"{self.server.url}{path} answered {body} with {answer}")

    def _ask(self, path: str, body: Body, headers: dict[str, str] | None) -> httpx.Response:
        options: RequestOptions = {"headers": headers or {}}
        return self.client.post(self.server.url + path, body=body, cast_to=httpx.Response, options=options)


@dataclass(frozen=True)
class FidelityPair:
    """`agree` and its like ask both and compare."""

    ours: Answerer
    plain: Answerer
    deployment: Deployment

    def agree(self, path: str, body: Body, *, way: str | None = None) -> dict[str, Any]:
        """Both answer alike; returns our answer.

        Args:
            way: how ours must have come about: "disaggregated" or "decode_only".
        """
        body = {"model": MODEL, **body}
        (ours, our_way), (theirs, _) = self.ours.post(path, body), self.plain.post(path, body)
        _assert_alike(ours, theirs, body)
        assert way in (None, our_way), f"{our_way}: {body}"
        return ours

    def agree_streamed(self, path: str, body: Body) -> dict[str, Any]:
        """Both streams say the same; returns what ours says, as one answer."""
        body = {"model": MODEL, **body}
        ours, theirs = self.ours.events(path, body), self.plain.events(path, body)
        for pick in (0, -1):  # the first and the last event have fields of their own, and one form
            assert _form(ours[pick]) == _form(theirs[pick]), f"{body}: {ours[pick]}, not {theirs[pick]}"
        whole = folded(ours)
        _assert_alike(whole, folded(theirs), body)
        return whole

    def agree_both_ways(self, path: str, body: Body) -> None:
        self.agree(path, body)
        self.agree_streamed(path, body)

    def refuse_alike(self, path: str, body: Body) -> Refusal:
        """Both refuse with the same status, type, message and parameter; returns ours."""
        body = {"model": MODEL, **body}
        ours, theirs = self.ours.refusal(path, body), self.plain.refusal(path, body)
        found = differences(asdict(ours), asdict(theirs))
        assert not found, "\n".join([f"asked {str(body)[:500]}", *found])
        return ours


def _assert_alike(ours: Any, theirs: Any, body: Body) -> None:
    found = differences(comparable(ours), comparable(theirs))
    assert not found, "\n".join([f"asked {str(body)[:500]}", *found])


def _form(event: dict[str, Any]) -> Any:
    """Which fields an event has, without what they hold. Of a delta only the role: the rest depends on the pieces."""
    choices = [(sorted(choice), "role" in (choice.get("delta") or ())) for choice in event["choices"]]
    return sorted(event), choices, sorted(event.get("usage") or ())


@contextmanager
def answerer(server: Server) -> Iterator[Answerer]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S) as client:
        yield Answerer(server, client)
