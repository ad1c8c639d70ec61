"""One request to one instance, on real sockets."""

import asyncio
from collections.abc import Callable

import pytest

from services.global_proxy.errors import DiedError, EngineStatusError, UnreachableError
from services.global_proxy.instances import leg as leg_module
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.leg import Leg
from tests.services.global_proxy.instances.conftest import MakeInstance
from tests.services.global_proxy.instances.raw_engine import (
    CHUNK,
    ERROR,
    LAST,
    STREAM,
    WHOLE,
    RawEngine,
    dies,
    is_silent,
    says,
    says_and_dies,
)

Failures = Callable[[Instance, str], float]


class Taker:
    """A sink."""

    def __init__(self) -> None:
        self.data = b""
        self.done = False

    def take(self, data: bytes, done: bool) -> None:
        self.data += data
        self.done = done


async def send(instance: Instance) -> bytes:
    leg = Leg(instance, 7)
    try:
        return (await leg.send(instance.endpoint.request(b"GET", b"/"))).body
    finally:
        leg.close()


async def test_it_counts_while_it_lasts(make_instance: MakeInstance) -> None:
    async with RawEngine(is_silent) as engine:
        instance = make_instance(engine.url)
        request = asyncio.create_task(send(instance))
        await engine.asked.wait()
        assert (instance.num_requests, instance.num_tokens) == (1, 7)
        request.cancel()
        await asyncio.wait([request])
        assert (instance.num_requests, instance.num_tokens) == (0, 0)
        await engine.gone.wait()  # which aborts the request there


async def test_answers_use_one_connection(make_instance: MakeInstance) -> None:
    async with RawEngine(says(WHOLE)) as engine:
        instance = make_instance(engine.url)
        assert [await send(instance) for _ in range(3)] == [b"{}"] * 3
        assert engine.num_connections == 1
        instance.endpoint.abort_all()


async def test_nobody_there(make_instance: MakeInstance, failures: Failures) -> None:
    async with RawEngine(says(WHOLE)) as engine:
        instance = make_instance(engine.url)
    with pytest.raises(UnreachableError):
        await send(instance)
    assert failures(instance, "unreachable") == 1
    assert instance.half_open
    assert instance.num_requests == 0


async def test_one_that_dies_is_not_asked_again(make_instance: MakeInstance, failures: Failures) -> None:
    async with RawEngine(dies) as engine:
        instance = make_instance(engine.url)
        with pytest.raises(DiedError):
            await send(instance)
        assert engine.num_requests == 1
        assert failures(instance, "died") == 1
        assert not instance.half_open


async def test_its_own_error_has_the_answer(make_instance: MakeInstance, failures: Failures) -> None:
    async with RawEngine(says(ERROR)) as engine:
        instance = make_instance(engine.url)
        with pytest.raises(EngineStatusError) as caught:
            await send(instance)
        assert (caught.value.status, caught.value.answer.body) == (503, b"[]")
        assert failures(instance, "status_503") == 1
        instance.endpoint.abort_all()


class TestAnIdleConnectionThatBreaks:
    """The engine may have closed it just as the request was sent."""

    async def test_is_replaced(self, make_instance: MakeInstance, failures: Failures) -> None:
        async with RawEngine(says(WHOLE), dies, says(WHOLE)) as engine:
            instance = make_instance(engine.url)
            assert [await send(instance) for _ in range(2)] == [b"{}"] * 2
            assert (engine.num_requests, engine.num_connections) == (3, 2)
            assert failures(instance, "died") == 0
            instance.endpoint.abort_all()

    async def test_is_replaced_once(self, make_instance: MakeInstance, failures: Failures) -> None:
        async with RawEngine(says(WHOLE), dies) as engine:
            instance = make_instance(engine.url)
            await send(instance)
            with pytest.raises(DiedError):
                await send(instance)
            assert engine.num_requests == 3
            assert failures(instance, "died") == 1

    async def test_late_has_died_at_work(
        self, make_instance: MakeInstance, failures: Failures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(leg_module, "_RACE_S", -1.0)
        async with RawEngine(says(WHOLE), dies) as engine:
            instance = make_instance(engine.url)
            await send(instance)
            with pytest.raises(DiedError):
                await send(instance)
            assert engine.num_requests == 2

    async def test_amid_its_answer_has_died(self, make_instance: MakeInstance) -> None:
        async with RawEngine(says(WHOLE), says_and_dies(WHOLE[:-1])) as engine:
            instance = make_instance(engine.url)
            await send(instance)
            with pytest.raises(DiedError):
                await send(instance)
            assert engine.num_requests == 2


class TestStream:
    async def stream(self, instance: Instance) -> Taker:
        leg, taker = Leg(instance, 7), Taker()
        try:
            answer = await leg.send(instance.endpoint.request(b"GET", b"/"))
            assert answer.head.is_stream
            await leg.relay_to(taker)
            return taker
        finally:
            leg.close()

    async def test_whole(self, make_instance: MakeInstance) -> None:
        async with RawEngine(says(STREAM + CHUNK, CHUNK, LAST)) as engine:
            instance = make_instance(engine.url)
            for _ in range(2):
                taker = await self.stream(instance)
                assert (taker.data, taker.done) == (CHUNK + CHUNK + LAST, True)
            assert engine.num_connections == 1
            instance.endpoint.abort_all()

    async def test_one_that_breaks_off_again_and_again_is_ejected(self, make_instance: MakeInstance) -> None:
        """Though it begins to answer each time."""
        async with RawEngine(says_and_dies(STREAM + CHUNK)) as engine:
            instance = make_instance(engine.url)
            for _ in range(3):
                assert not instance.half_open
                with pytest.raises(DiedError):
                    await self.stream(instance)
            assert instance.half_open

    async def test_a_whole_one_in_between_is_forgiving(self, make_instance: MakeInstance) -> None:
        bad, good = says_and_dies(STREAM + CHUNK), says(STREAM + CHUNK + LAST)
        async with RawEngine(bad, bad, good, bad, bad, good) as engine:
            instance = make_instance(engine.url)
            for _ in range(2):
                for _ in range(2):
                    with pytest.raises(DiedError):
                        await self.stream(instance)
                await self.stream(instance)
            assert not instance.half_open
            instance.endpoint.abort_all()

    async def test_one_that_nobody_reads_to_its_end_is_broken_off(self, make_instance: MakeInstance) -> None:
        async with RawEngine(says(STREAM + CHUNK)) as engine:
            instance = make_instance(engine.url)
            leg = Leg(instance, 7)
            await leg.send(instance.endpoint.request(b"GET", b"/"))
            leg.close()
            await engine.gone.wait()
            assert instance.num_requests == 0
