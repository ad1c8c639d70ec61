"""Health checks of engines that answer, fail, freeze or are not there."""

import asyncio

from services.global_proxy.instances.health import HealthCheck
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.leg import Leg
from tests.services.global_proxy.instances.conftest import MakeInstance
from tests.services.global_proxy.instances.raw_engine import ERROR, WHOLE, RawEngine, dies, is_silent, says


class Watched:
    """`async with Watched(instance, timeout_s) as watched:` checks it all the time."""

    def __init__(self, instance: Instance, timeout_s: float = 20.0) -> None:
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        self._instance = instance
        self.check = HealthCheck(instance, 0.001, timeout_s, 3, lambda: self.changes.put_nowait(instance.unhealthy))

    async def __aenter__(self) -> "Watched":
        self.task = asyncio.create_task(self.check.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._instance.endpoint.abort_all()


async def test_one_that_answers_is_healthy(make_instance: MakeInstance) -> None:
    async with RawEngine(says(WHOLE)) as engine, Watched(make_instance(engine.url)) as watched:
        await watched.check.checked.wait()
        while engine.num_requests < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert watched.changes.empty()
        assert engine.num_connections == 1


async def test_an_error_is_an_answer(make_instance: MakeInstance) -> None:
    async with (
        RawEngine(says(WHOLE), says(ERROR), says(WHOLE)) as engine,
        Watched(make_instance(engine.url)) as watched,
    ):
        assert await watched.changes.get() is True
        assert engine.num_requests == 2
        assert await watched.changes.get() is False


async def test_a_refused_connection_is_an_answer(make_instance: MakeInstance) -> None:
    async with RawEngine(says(WHOLE)) as engine:
        instance = make_instance(engine.url)
    async with Watched(instance) as watched:
        assert await watched.changes.get() is True


async def test_two_misses_are_none(make_instance: MakeInstance) -> None:
    acts = [dies, dies, says(WHOLE)] * 3
    async with RawEngine(*acts) as engine, Watched(make_instance(engine.url)) as watched:
        while engine.num_requests <= len(acts):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert watched.changes.empty()


async def test_one_that_freezes_and_thaws(make_instance: MakeInstance) -> None:
    """What it has then would wait for its deadline: it is broken off."""
    async with RawEngine(is_silent) as engine:
        instance = make_instance(engine.url)
        leg = Leg(instance, 1)
        request = asyncio.create_task(leg.send(instance.endpoint.request(b"GET", b"/")))
        await engine.asked.wait()
        async with Watched(instance, timeout_s=0.1) as watched:
            assert await watched.changes.get() is True
            assert watched.check.checked.is_set()
            await asyncio.wait([request])
            assert request.exception() is not None
            leg.close()
            engine.acts = [says(WHOLE)]
            assert await watched.changes.get() is False


async def test_nobody_waits_for_a_check_that_is_over(make_instance: MakeInstance) -> None:
    async with RawEngine(is_silent) as engine, Watched(make_instance(engine.url)) as watched:
        await engine.asked.wait()
        watched.task.cancel()
        await watched.check.checked.wait()
