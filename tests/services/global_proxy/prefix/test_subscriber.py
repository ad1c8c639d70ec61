import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import uvloop
import zmq

from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.sockets import Endpoints
from services.global_proxy.prefix.subscriber import Subscriber
from services.global_proxy.prefix.subscribers import Subscribers
from tests.services.global_proxy.prefix.blocks import packed, removed, stored
from tests.services.global_proxy.prefix.publisher import Publisher

TEXT = tuple(range(1, 12))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class Pair:
    publisher: Publisher
    subscriber: Subscriber
    index: KvEventIndex
    replays: asyncio.Task[None]

    def cached(self) -> int:
        """Tokens of TEXT."""
        return self.index.cached_tokens(packed(TEXT)).get("p", 0)

    async def until_cached(self, num_tokens: int) -> None:
        await until(lambda: self.cached() == num_tokens)

    async def stop(self) -> None:
        self.replays.cancel()
        await asyncio.wait([self.replays])
        self.publisher.close()

    def serve(self) -> None:
        self.replays = asyncio.create_task(self.publisher.serve_replays())


@asynccontextmanager
async def pair(
    *,
    with_replay: bool = True,
    before: int = 0,
    replay_timeout_s: float = 5.0,
    secret_key: bytes | None = None,
    server_key: bytes | None = None,
) -> AsyncIterator[Pair]:
    """Args: before: so many blocks of TEXT are published before anybody listens, each in a batch."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = Publisher(context, secret_key)
    for block in range(before):
        publisher.remember(stored(TEXT[: 2 * block + 2], first=block))
    endpoints = replace(publisher.endpoints, server_key=server_key)
    if not with_replay:
        endpoints = replace(endpoints, replay=None)
    index = KvEventIndex()
    subscriber = Subscriber("p", endpoints, index, context, replay_timeout_s)
    running = asyncio.create_task(subscriber.run())
    both = Pair(publisher, subscriber, index, asyncio.create_task(publisher.serve_replays()))
    try:
        yield both
    finally:
        running.cancel()
        both.replays.cancel()
        await asyncio.wait([running, both.replays])
        publisher.close()
        context.destroy(linger=0)
    assert "p" not in index
    assert running.cancelled()


async def test_what_was_before_and_what_comes() -> None:
    async with pair(before=2) as both:
        await both.until_cached(4)
        await both.publisher.until_subscribed()
        both.publisher.publish(stored(TEXT[:6], first=2))
        await both.until_cached(6)
        both.publisher.publish(removed(TEXT[:4]))
        await both.until_cached(2)
        assert both.publisher.num_replays == 1
        assert both.subscriber.num_batches == 4


async def test_a_gap_is_filled() -> None:
    async with pair(before=1) as both:
        await both.until_cached(2)
        await both.publisher.until_subscribed()
        both.publisher.remember(stored(TEXT[:4], first=1))
        both.publisher.publish(stored(TEXT[:6], first=2))
        await both.until_cached(6)
        assert both.subscriber.num_losses == 0
        both.publisher.publish(removed(TEXT[:6]))  # which came twice, and is one
        await both.until_cached(4)
        assert both.publisher.num_replays == 2


async def test_a_gap_that_nobody_remembers_means_to_begin_anew() -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await both.publisher.until_subscribed()
        both.publisher.remember(removed(TEXT[:2]))  # what it misses: it must not go on believing
        both.publisher.remembered.clear()
        both.publisher.publish(stored((7, 7)))
        await until(lambda: both.subscriber.num_batches == 5)
        assert both.cached() == 0
        assert both.index.num_blocks("p") == 1
        assert both.subscriber.num_losses == 1


async def test_without_replays_a_gap_means_to_begin_anew() -> None:
    async with pair(with_replay=False) as both:
        await both.publisher.until_subscribed()
        await until(lambda: "p" in both.index)
        both.publisher.publish(stored(TEXT[:6]))
        await both.until_cached(6)
        both.publisher.remember(removed(TEXT[:2]))
        both.publisher.publish(stored((7, 7)))
        await until(lambda: both.subscriber.num_batches == 3)
        assert both.cached() == 0
        assert both.index.num_blocks("p") == 1


async def test_a_replay_that_loses_some_is_asked_for_again() -> None:
    async with pair() as both:
        await both.publisher.until_subscribed()
        await until(lambda: both.publisher.num_replays == 1)
        both.publisher.num_dropped = 1
        for block in range(4):
            both.publisher.remember(stored(TEXT[: 2 * block + 2], first=block))
        both.publisher.publish(stored(TEXT[:10], first=4))
        await both.until_cached(10)
        assert both.subscriber.num_losses == 0
        assert both.publisher.num_replays > 2


async def test_a_mute_replay_endpoint_is_not_waited_for_long(caplog: pytest.LogCaptureFixture) -> None:
    async with pair(replay_timeout_s=0.05) as both:
        both.publisher.is_mute = True
        await both.publisher.until_subscribed()
        await until(lambda: "p" in both.index)
        both.publisher.publish(stored(TEXT[:4]))
        await both.until_cached(4)
        both.publisher.remember(removed(TEXT[:2]))
        both.publisher.publish(stored((7, 7)))
        await until(lambda: both.subscriber.num_losses == 1)
        await until(lambda: both.index.num_blocks("p") == 1)
    assert "repeats nothing" in caplog.text


async def test_an_engine_that_starts_anew() -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await both.stop()
        await until(lambda: both.cached() == 0)
        await both.publisher.restart()
        both.publisher.remember(stored(TEXT[:2]))
        for number in range(4):  # it has come further than before when it is reached
            both.publisher.remember(stored((7, number)))
        both.serve()
        await until(lambda: both.subscriber.num_batches == 5)
        assert both.cached() == 2


async def test_an_engine_that_is_gone() -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await both.stop()
        await until(lambda: "p" not in both.index)


@pytest.mark.parametrize("frames", [[b"topic"], [b"", b"short", b""], [b"", bytes(8), b"", b""]])
async def test_what_is_no_batch(frames: list[bytes]) -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await both.publisher.until_subscribed()
        both.publisher.send_frames(*frames)
        await until(lambda: both.subscriber.num_losses == 1)
        assert both.cached() == 0


async def test_a_batch_without_sense_is_the_end_of_what_was_known(caplog: pytest.LogCaptureFixture) -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await both.publisher.until_subscribed()
        both.publisher.send(3, b"\xc1")
        await until(lambda: both.subscriber.num_losses == 1)
        assert both.cached() == 0
        both.publisher.remember()
        both.publisher.publish(stored(TEXT[:2]))
        await both.until_cached(2)
    assert "KV events of p: no batch" in caplog.text


async def test_many_batches_do_not_keep_others_waiting() -> None:
    async with pair() as both:
        await both.publisher.until_subscribed()
        await until(lambda: both.publisher.num_replays == 1)
        for _ in range(500):
            both.publisher.publish(stored(TEXT[:2]))
        time.sleep(0.2)  # noqa: ASYNC251 (this loop shall read none of them yet)
        most, seen = 0, both.subscriber.num_batches
        while both.subscriber.num_batches < 500:
            await asyncio.sleep(0)
            most, seen = max(most, both.subscriber.num_batches - seen), both.subscriber.num_batches
        assert most <= 64


async def test_waiting_takes_no_cpu() -> None:
    async with pair(before=3) as both:
        await both.until_cached(6)
        await asyncio.sleep(0.05)
        before_s = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before_s < 0.2  # a loop that spins takes it all


async def test_curve() -> None:
    public, secret = zmq.curve_keypair()
    async with pair(before=2, secret_key=secret, server_key=public) as both:
        await both.until_cached(4)
    other, _ = zmq.curve_keypair()
    for server_key in (other, None):
        async with pair(before=2, secret_key=secret, server_key=server_key) as both:
            await asyncio.sleep(0.3)
            assert "p" not in both.index


def test_an_address_of_our_deployments() -> None:
    assert Endpoints.at("h:5", b"key") == Endpoints("tcp://h:5", "tcp://h:6", b"key")
    assert Endpoints.at("[::1]:5") == Endpoints("tcp://[::1]:5", "tcp://[::1]:6")
    for address in ("h", "h:", "h:x"):
        with pytest.raises(ValueError, match="invalid literal"):
            Endpoints.at(address)


async def test_subscribers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    index = KvEventIndex()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = Publisher(context)
    publisher.remember(stored(TEXT))
    replays = asyncio.create_task(publisher.serve_replays())
    subscribers = Subscribers(index)
    subscribers.add("p", publisher.endpoints)
    subscribers.add("wrong", Endpoints("tcp://nonsense"))
    await until(lambda: index.num_blocks("p") == 5)
    assert subscribers.num_batches("p") == 1
    assert subscribers.num_losses == 0
    await until(lambda: "subscriber of wrong ended" in caplog.text)
    await subscribers.remove("wrong")
    await subscribers.remove("p")
    await subscribers.remove("p")
    assert "p" not in index
    subscribers.add("p", publisher.endpoints)
    await subscribers.close()
    replays.cancel()
    await asyncio.wait([replays])
    publisher.close()
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "test",
    [
        test_what_was_before_and_what_comes,
        test_a_gap_is_filled,
        test_an_engine_that_starts_anew,
        test_waiting_takes_no_cpu,
    ],
)
def test_the_same_on_uvloop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(test())
