"""Clients of the proxy, who check every answer."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any, Literal, Self

import aiohttp

from tests.standins.fast_engine import expected_text

REQUEST_TIMEOUT_S = 15.0  # the proxies of these tests are given it
_CLIENT_TIMEOUT_S = REQUEST_TIMEOUT_S + 15.0  # then the proxy is late

Kind = Literal["good", "refused", "error_event", "broken"]


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times are on the monotonic clock.

    Attributes:
        kind: "good": the right answer, all of it. "refused": an error status. "error_event": a stream that ended with
            an error, after nothing but right tokens. "broken": the connection broke.
        error: of "refused" and "error_event", the OpenAI error.
    """

    prompt: str
    is_stream: bool
    sent_s: float
    ended_s: float
    kind: Kind
    status: int = 0
    error: dict[str, Any] | None = None
    headers: dict[str, str] | None = None


class Client:
    """`async with Client(url) as client`. Fails on every answer that is neither right nor an error as OpenAI's."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=_CLIENT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self,
        prompt: str,
        num_tokens: int = 5,
        stream: bool = False,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Outcome:
        """Raises AssertionError: the answer is wrong, or late."""
        body = {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "stream": stream} | fields
        sent_s, status, right = time.monotonic(), 0, expected_text(prompt, num_tokens)
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body, headers=headers) as answer:
                status = answer.status
                text = (await answer.read()).decode()
        except TimeoutError:
            raise AssertionError(f"no end within {_CLIENT_TIMEOUT_S:g} s: {prompt!r}") from None
        except aiohttp.ClientError:
            return Outcome(prompt, stream, sent_s, time.monotonic(), "broken", status)
        error, ended_s = _check(status, text, right, stream), time.monotonic()
        kind: Kind = "good" if error is None else "refused" if status != 200 else "error_event"
        lower = {name.lower(): value for name, value in answer.headers.items()}
        return Outcome(prompt, stream, sent_s, ended_s, kind, status, error, lower)


def _check(status: int, text: str, right: str, stream: bool) -> dict[str, Any] | None:
    """The error in an answer, if it is one. Raises AssertionError: it is neither one nor right."""
    if status != 200:
        return _openai_error(json.loads(text), status)
    if not stream:
        assert json.loads(text)["choices"][0]["text"] == right
        return None
    events = text.split("\n\n")
    assert events.pop() == "", "half an event"
    is_done = events[-1] == "data: [DONE]"
    contents = [json.loads(event.removeprefix("data: ")) for event in events[: -1 if is_done else None]]
    error = None
    if not is_done:
        error = _openai_error(contents.pop())
    sent = "".join(content["choices"][0]["text"] for content in contents)
    assert sent == right if is_done else right.startswith(sent), f"wrong tokens: {sent!r}, not {right!r}"
    return error


def _openai_error(content: dict[str, Any], status: int | None = None) -> dict[str, Any]:
    assert "error" in content, f"the end is missing: {content}"
    error: dict[str, Any] = content["error"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] == status or (status is None and error["code"] >= 500)
    return error


class Load:
    """`async with Load(url) as load`: clients that ask one thing after the other, half of them for streams."""

    def __init__(self, url: str, num_clients: int = 20, pause_s: float = 0.05) -> None:
        self.outcomes: list[Outcome] = []
        self._url = url
        self._num_clients = num_clients
        self._pause_s = pause_s
        self._ending = False

    async def __aenter__(self) -> Self:
        self._client = await Client(self._url).__aenter__()
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._num_clients)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.stop(wait=kind is None)

    async def stop(self, wait: bool = True) -> None:
        """Have the last requests end."""
        self._ending = True
        if not wait:
            for task in self._tasks:
                task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=not wait)
        self._tasks = []
        await self._client.__aexit__()
        assert not wait or len(results) in (0, self._num_clients)

    async def successes(self, count: int, limit_s: float = 30.0) -> None:
        """Until so many more requests, all sent from now on, were answered well."""
        now_s, end_s = time.monotonic(), time.monotonic() + limit_s
        while sum(o.kind == "good" and o.sent_s >= now_s for o in self.outcomes) < count:
            for task in self._tasks:
                if task.done():
                    task.result()  # raises
            assert time.monotonic() < end_s, f"the proxy does not serve: {self.failed_since(now_s)[-3:]}"
            await asyncio.sleep(0.02)

    def failed_since(self, since_s: float = 0.0) -> list[Outcome]:
        """Not answered well, of those that ended since then."""
        return [o for o in self.outcomes if o.kind != "good" and o.ended_s >= since_s]

    def first_success_s(self, since_s: float) -> float:
        """From then to the first good answer to a request that was sent since then."""
        return min(o.ended_s for o in self.outcomes if o.kind == "good" and o.sent_s >= since_s) - since_s

    async def _run(self, number: int) -> None:
        rng = random.Random(number)
        sequence = 0
        while not self._ending:
            sequence += 1
            prompt = f"client {number} asks {sequence} {rng.random()} " + "x" * rng.randrange(100)
            outcome = await self._client.ask(prompt, rng.randrange(3, 10), stream=number % 2 == 0)
            self.outcomes.append(outcome)
            await asyncio.sleep(self._pause_s)
