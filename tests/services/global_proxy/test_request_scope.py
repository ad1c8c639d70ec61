"""What ends a request early, without sockets."""

import asyncio
from typing import Any

import pytest

from services.global_proxy.errors import ClientGoneError, DeadlineError, DrainingError
from services.global_proxy.request_scope import InFlight, RequestScope


async def hang_up() -> Any:
    return {"type": "http.disconnect"}


async def stay() -> Any:
    await asyncio.Event().wait()


async def test_deadline() -> None:
    with pytest.raises(DeadlineError, match=r"longer than 0\.01 s"):
        async with RequestScope(0.01):
            await stay()


async def test_client_hangs_up() -> None:
    async def serve() -> None:
        async with RequestScope(60) as scope:
            scope.watch_client(hang_up, lambda: False)
            await stay()

    with pytest.raises(ClientGoneError):
        await serve()


async def test_hanging_up_after_the_answer_is_no_hanging_up() -> None:
    async with RequestScope(60) as scope:
        scope.watch_client(hang_up, lambda: True)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_nothing_watches_after_the_end() -> None:
    async with RequestScope(60) as scope:
        scope.watch_client(stay, lambda: False)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_ending_it_outside_the_block_does_nothing() -> None:
    scope = RequestScope(60)
    scope.end(ClientGoneError())
    async with scope:
        pass
    scope.end(ClientGoneError())


async def test_the_first_reason_wins() -> None:
    async def serve() -> None:
        async with RequestScope(60) as scope:
            scope.end(DrainingError("first"))
            await asyncio.sleep(0)
            scope.end(ClientGoneError())
            await stay()

    with pytest.raises(DrainingError, match="first"):
        await serve()


async def test_a_timeout_of_the_block_itself_passes() -> None:
    with pytest.raises(TimeoutError, match="mine"):
        async with RequestScope(60):
            raise TimeoutError("mine")


async def test_drain_of_nothing_is_immediate_and_final() -> None:
    in_flight = InFlight()
    await in_flight.drain(60)
    with pytest.raises(DrainingError):
        in_flight.add(RequestScope(1))
