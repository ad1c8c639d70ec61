"""What ends a request early, without sockets."""

import asyncio
import time

import pytest

from services.global_proxy.errors import ClientGoneError, DeadlineError, DrainingError, RequestEndedError
from services.global_proxy.request_scope import InFlight, RequestScope


def start(in_flight: InFlight) -> tuple[asyncio.Task[RequestEndedError | None], list[RequestScope]]:
    """A request that is served until something ends it; the task returns why."""
    scopes: list[RequestScope] = []

    async def serve() -> RequestEndedError | None:
        task = asyncio.current_task()
        assert task is not None
        scope = in_flight.open(task, time.monotonic())
        scopes.append(scope)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return scope.why
        finally:
            in_flight.close(scope)
        return None

    return asyncio.create_task(serve()), scopes


async def test_deadline() -> None:
    task, _ = start(InFlight(0.01))
    why = await task
    assert isinstance(why, DeadlineError)
    assert "longer than 0.01 s" in str(why)


async def test_each_has_its_own_deadline() -> None:
    in_flight = InFlight(0.05)
    first, _ = start(in_flight)
    await asyncio.sleep(0.03)
    second, _ = start(in_flight)
    assert isinstance(await first, DeadlineError)
    assert not second.done()
    assert isinstance(await second, DeadlineError)


async def test_the_first_reason_wins() -> None:
    task, scopes = start(InFlight(60))
    await asyncio.sleep(0)
    scopes[0].end(DrainingError("first"))
    scopes[0].end(ClientGoneError())
    assert str(await task) == "first"


async def test_after_its_end_nothing_happens() -> None:
    in_flight = InFlight(60)
    task, scopes = start(in_flight)
    await asyncio.sleep(0)
    in_flight.close(scopes[0])
    scopes[0].end(ClientGoneError())
    assert scopes[0].why is None
    in_flight._scopes[scopes[0]] = None  # the task closes it, too
    task.cancel()
    await task


async def test_drain_waits_for_what_is_in_flight() -> None:
    in_flight = InFlight(60)
    task, _ = start(in_flight)
    await asyncio.sleep(0)
    draining = asyncio.create_task(in_flight.drain(60))
    await asyncio.sleep(0)
    assert not draining.done()
    task.cancel()
    await draining


async def test_drain_ends_what_takes_too_long() -> None:
    in_flight = InFlight(60)
    task, _ = start(in_flight)
    await asyncio.sleep(0)
    await in_flight.drain(0.01)
    assert isinstance(await task, DrainingError)


async def test_drain_of_nothing_is_immediate_and_final() -> None:
    in_flight = InFlight(60)
    await in_flight.drain(60)
    with pytest.raises(DrainingError):
        in_flight.admit()
