"""A plain engine, or a D beside one, is lost in the middle of a stream: another of either kind goes on with it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.services.global_proxy.conftest import Deploy
from tests.services.global_proxy.replay.test_streams import CHAT, COMPLETIONS, WITH_USAGE, Engines, _text
from tests.standins.token_engine import Fates, Habits, TokenEngine

Start = Callable[..., Awaitable[Engines]]


@pytest.fixture
async def start(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr("services.global_proxy.retries._RESERVE", 1e6)  # these tests kill nothing but engines
    async with AsyncExitStack() as stack:

        async def run(num_disaggregated: int, num_mixed: int, habits: Habits | None = None, **settings: Any) -> Engines:
            """So many P, as many D, and plain engines; the latter two share their fates."""
            fates = Fates()
            prefill = [await stack.enter_async_context(TokenEngine()) for _ in range(num_disaggregated)]
            answering = [
                await stack.enter_async_context(TokenEngine(fates, habits))
                for _ in range(num_disaggregated + num_mixed)
            ]
            urls = [engine.url for engine in answering]
            decode, mixed = tuple(urls[:num_disaggregated]), tuple(urls[num_disaggregated:])
            proxy = await deploy(
                0, 0, tuple(engine.url for engine in prefill), decode, extra_mixed_urls=mixed, **settings
            )
            proxy.client.headers.update({"connection": "close"})
            return Engines(prefill, answering, fates, proxy)

        yield run


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("num_disaggregated", "num_mixed"), [(0, 2), (1, 1)])
async def test_at_every_event(start: Start, path: str, num_disaggregated: int, num_mixed: int) -> None:
    engines = await start(num_disaggregated, num_mixed)
    whole = await engines.alone(path, **WITH_USAGE)
    assert await engines.stream(path, **WITH_USAGE) == whole
    assert engines.headers["x-omni-continuable"] == "exact"
    paths = set()
    for death in range(whole.count(b"\n\n")):
        assert await engines.stream(path, (death,), **WITH_USAGE) == whole, death
        assert engines.fates.num_begun == 2
        paths.add(engines.headers["x-omni-path"])
    assert paths == ({"mixed"} if num_disaggregated == 0 else {"mixed", "disaggregated"})
    await engines.proxy.idle()


async def test_a_continued_completion_needs_no_hand_off_of_a_plain_engine(start: Start) -> None:
    engines = await start(0, 2)
    await engines.stream(COMPLETIONS, (5,))
    first, second = (body for engine in engines.decode for body in engine.bodies)
    assert "kv_transfer_params" not in first
    assert not second.get("kv_transfer_params")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_several_tokens_in_an_event(start: Start, path: str) -> None:
    """Which of them stand for the text, a plain engine tells."""
    engines = await start(0, 2, Habits(tokens_an_event=(3, 1, 2)))
    whole = await engines.alone(path)
    for death in range(1, whole.count(b"\n\n"), 2):
        assert _text(await engines.stream(path, (death,))) == _text(whole), death


async def test_one_alone_is_not_followed(start: Start) -> None:
    engines = await start(0, 1)
    data = await engines.stream(COMPLETIONS, (5,), "inside an event")
    assert "x-omni-continuable" not in engines.headers
    assert b'data: {"error":' in data
