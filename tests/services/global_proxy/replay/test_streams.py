"""D is lost at every point of a stream: the client's bytes are those of a stream whose D lived."""

import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.services.global_proxy.conftest import Deploy, Deployment
from tests.standins.token_engine import Fates, Habits, TokenEngine, encode

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
WITH_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
NUM_TOKENS = 40


class Engines:
    """Two P, some D, and the proxy in front of them."""

    def __init__(self, prefill: list[TokenEngine], decode: list[TokenEngine], fates: Fates, proxy: Deployment) -> None:
        self.prefill = prefill
        self.decode = decode
        self.fates = fates
        self.proxy = proxy

    async def stream(self, path: str, deaths: tuple[int, ...] = (), how: str = "between", **fields: Any) -> bytes:
        """All that the client gets, without the request's own id and time of birth, which must not change."""
        self.fates.deaths, self.fates.how, self.fates.num_begun = list(deaths), how, 0
        text = "Tell ☂ me!"
        prompt = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
        usual = {"model": "m", "stream": True, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        async with self.proxy.client.post(self.proxy.url + path, json=usual | prompt | fields) as response:
            assert response.status == 200
            self.headers = response.headers
            data = await response.read()
        for engine in self.prefill + self.decode:
            assert engine.wrong == []
        names = set(re.findall(rb'"id":"([\w-]+)"', data))
        births = set(re.findall(rb'"created":(\d+)', data))
        assert len(names) <= 1, "one id"
        assert len(births) <= 1, "one time"
        return re.sub(rb'"created":\d+', b'"created":0', re.sub(rb'"id":"[\w-]+"', b'"id":""', data))

    async def alone(self, path: str, **fields: Any) -> bytes:
        """The same from D itself, which nobody asks for token ids."""
        real, self.proxy.port = self.proxy.port, int(self.decode[0].url.rpartition(":")[2])
        self.proxy.client.headers["x-request-id"] = "abc"
        try:
            return await self.stream(path, **fields)
        finally:
            self.proxy.port = real
            del self.proxy.client.headers["x-request-id"]


Start = Callable[..., Awaitable[Engines]]


@pytest.fixture
async def start(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr("services.global_proxy.retries._RESERVE", 1e6)  # these tests kill nothing but engines
    async with AsyncExitStack() as stack:

        async def run(habits: Habits | None = None, num_decode: int = 2, **settings: Any) -> Engines:
            fates = Fates()
            prefill = [await stack.enter_async_context(TokenEngine()) for _ in range(2)]
            decode = [await stack.enter_async_context(TokenEngine(fates, habits)) for _ in range(num_decode)]
            urls = tuple(tuple(engine.url for engine in engines) for engines in (prefill, decode))
            proxy = await deploy(0, 0, *urls, **{"min_prefill_tokens": 0} | settings)
            proxy.client.headers.update({"connection": "close"})
            return Engines(prefill, decode, fates, proxy)

        yield run


def _num_events(data: bytes) -> int:
    return data.count(b"\n\n")


@pytest.mark.parametrize("how", ["between", "inside an event", "inside a chunk", "says so"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_at_every_event(start: Start, path: str, how: str) -> None:
    engines = await start()
    whole = await engines.alone(path)
    assert all(text in whole.decode() for text in ("你", "😀", "é", '\\"', "\\n", '\\"token_ids\\":[7]'))
    assert await engines.stream(path) == whole
    assert engines.headers["x-omni-continuable"] == "exact"
    for death in range(_num_events(whole)):
        assert await engines.stream(path, (death,), how) == whole, death
        assert engines.fates.num_begun == 2
    await engines.proxy.idle()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_usage_is_the_client_s(start: Start, path: str) -> None:
    engines = await start()
    whole = await engines.alone(path, **WITH_USAGE)
    assert b'"usage":{"prompt_tokens":' in whole
    for death in range(_num_events(whole)):
        assert await engines.stream(path, (death,), **WITH_USAGE) == whole, death


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "habits",
    [
        Habits(events_a_chunk=3),
        Habits(events_a_chunk=0),
        Habits(has_parser=True),
        Habits(has_parser=True, events_a_chunk=0),
    ],
)
async def test_however_it_is_written(start: Start, path: str, habits: Habits) -> None:
    engines = await start(habits)
    whole = await engines.alone(path)
    for death in range(1, _num_events(whole), 2):
        for how in ("between", "inside an event", "says so"):
            assert await engines.stream(path, (death,), how) == whole, (death, how)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("sizes", [(2,), (1, 3), (3, 1, 2)])
async def test_several_tokens_in_an_event(start: Start, path: str, sizes: tuple[int, ...]) -> None:
    """The next D may put them together otherwise; their text is the same."""
    engines = await start(Habits(tokens_an_event=sizes))
    whole = await engines.alone(path)
    for death in range(_num_events(whole)):
        assert _text(await engines.stream(path, (death,))) == _text(whole), death


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_two_deaths(start: Start, path: str) -> None:
    engines = await start(num_decode=3)
    whole = await engines.alone(path, **WITH_USAGE)
    for first, second in itertools.product((0, 1, 2, 3, 4, 20, 38, 39, 40, 41), (0, 1, 2)):
        assert await engines.stream(path, (first, second), **WITH_USAGE) == whole, (first, second)
        assert engines.fates.num_begun == 3


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_limits_are_the_client_s(start: Start, path: str) -> None:
    engines = await start()
    limits: list[dict[str, Any]] = [
        {"max_tokens": 1},
        {"max_tokens": 7},
        {"max_tokens": 300, "ignore_eos": False},
        {"max_tokens": 300, "ignore_eos": False, "min_tokens": 100},
        {"max_tokens": 300, "stop": "]"},
    ]
    if path == CHAT:
        limits += [{"max_completion_tokens": 9, "max_tokens": 4}, {"max_completion_tokens": None, "max_tokens": 4}]
    for fields in limits:
        whole = await engines.alone(path, **fields)
        for death in {1, 2, 3, _num_events(whole) // 2, _num_events(whole) - 2, _num_events(whole) - 1}:
            assert await engines.stream(path, (death,), **fields) == whole, (fields, death)


async def test_a_completion_without_a_limit_has_vllm_s(start: Start) -> None:
    engines = await start()
    whole = await engines.alone(COMPLETIONS, ignore_eos=True, max_tokens=16)
    async with engines.proxy.client.post(
        engines.proxy.url + COMPLETIONS,
        json={"model": "m", "prompt": "Tell ☂ me!", "stream": True, "temperature": 0, "ignore_eos": True},
    ) as response:
        assert _text(await response.read()) == _text(whole)
    engines.fates.deaths, engines.fates.num_begun = [5], 0
    async with engines.proxy.client.post(
        engines.proxy.url + COMPLETIONS,
        json={"model": "m", "prompt": "Tell ☂ me!", "stream": True, "temperature": 0, "ignore_eos": True},
    ) as response:
        assert _text(await response.read()) == _text(whole)
    assert engines.fates.num_begun == 2


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "settings",
    [
        {"min_prefill_tokens": 100_000},  # D alone
        {"mode": "layerwise", "kv_addresses": ("127.0.0.1:1", "127.0.0.1:2")},
        {"connector": "nixl"},
    ],
)
async def test_every_way_of_handing_off(start: Start, path: str, settings: dict[str, Any]) -> None:
    engines = await start(**settings)
    whole = await engines.alone(path)
    for death in (0, 1, 2, 9, 10, 11, _num_events(whole) - 1):
        assert await engines.stream(path, (death,)) == whole, death
        assert engines.fates.num_begun == 2
    await engines.proxy.idle()


async def test_token_ids_as_a_prompt(start: Start) -> None:
    engines = await start()
    for ids in (encode("Hello"), encode("☂")[:-1]):  # the second one ends inside of a character
        whole = await engines.alone(COMPLETIONS, prompt=ids)
        for death in range(8):
            assert await engines.stream(COMPLETIONS, (death,), prompt=ids) == whole


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_without_another_d_it_ends_in_an_error(start: Start, path: str) -> None:
    engines = await start(num_decode=1)
    whole = await engines.alone(path)
    data = await engines.stream(path, (5,), "inside an event")
    assert "x-omni-continuable" not in engines.headers
    assert b"[DONE]" not in data
    assert b'data: {"error":' in data
    assert whole.startswith(data[: data.index(b'data: {"choices"')] if b'data: {"choices"' in data else b"")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_when_the_others_die_too_it_ends_in_an_error(start: Start, path: str) -> None:
    engines = await start()
    whole = await engines.alone(path)
    data = await engines.stream(path, (5, 3), "inside an event")
    *events, last, nothing = data.split(b"\n\n")
    assert nothing == b""
    assert last.startswith(b'data: {"error":')
    assert whole.startswith(b"\n\n".join(events))
    assert len(events) > 5
    await engines.proxy.idle()


@pytest.mark.parametrize(
    ("fields", "habits"),
    [
        ({"presence_penalty": 0.5}, Habits()),
        ({}, Habits(hides_token_ids=True)),
        ({}, Habits(reasons=True)),
    ],
)
async def test_what_would_not_be_exact_ends_in_an_error(start: Start, fields: dict[str, Any], habits: Habits) -> None:
    engines = await start(habits)
    data = await engines.stream(CHAT, (8,), **fields)
    assert b"[DONE]" not in data
    assert b'data: {"error":' in data
    assert engines.fates.num_begun == 1


async def test_a_stream_in_which_nothing_was_sent_begins_anew_even_so(start: Start) -> None:
    engines = await start(Habits(reasons=True))
    assert b"[DONE]" in await engines.stream(CHAT, (0,))


async def test_a_refusal_in_the_stream_is_the_client_s(start: Start) -> None:
    """vLLM checks some parameters when it has answered 200 already. Another D would refuse too."""
    engines = await start()
    data = await engines.stream(COMPLETIONS, (0,), "refuses")
    assert data == b'data: {"error":{"message":"no","type":"BadRequestError","code":400}}\n\ndata: [DONE]\n\n'
    assert engines.fates.num_begun == 1


async def test_switched_off(start: Start) -> None:
    engines = await start(continue_streams=False)
    assert b"[DONE]" not in await engines.stream(COMPLETIONS, (5,))
    assert not any("return_token_ids" in body for engine in engines.decode for body in engine.bodies)


def _text(data: bytes) -> str:
    events = [json.loads(event[6:]) for event in data.split(b"\n\n") if event.startswith(b"data: {")]
    assert data.endswith(b"data: [DONE]\n\n")
    assert not any("error" in event for event in events)
    pieces = [c.get("text") or (c.get("delta") or {}).get("content") or "" for e in events for c in e["choices"]]
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    return "".join(pieces) + str(reasons)
