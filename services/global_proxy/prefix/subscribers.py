"""The subscribers of all prefill engines that tell their KV events."""

import asyncio
import logging

import zmq

from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.sockets import Endpoints
from services.global_proxy.prefix.subscriber import Subscriber

logger = logging.getLogger(__name__)


class Subscribers:
    """One subscriber for each engine. Make it where the loop runs: after forking, for ZeroMQ has a thread."""

    def __init__(self, index: KvEventIndex) -> None:
        self._index = index
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._running: dict[str, tuple[Subscriber, asyncio.Task[None]]] = {}

    def add(self, name: str, endpoints: Endpoints) -> None:
        """Follow an engine that is not followed yet."""
        assert name not in self._running, name
        subscriber = Subscriber(name, endpoints, self._index, self._context)
        task = asyncio.create_task(subscriber.run(), name=f"subscriber of {name}")
        task.add_done_callback(_report)
        self._running[name] = subscriber, task

    async def remove(self, name: str) -> None:
        """Follow it no more. Nothing happens if it is not followed."""
        if name in self._running:
            _, task = self._running.pop(name)
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        for name in list(self._running):
            await self.remove(name)
        self._context.destroy(linger=0)

    def num_batches(self, name: str) -> int:
        """How many batches of an engine that is followed are in the index."""
        return self._running[name][0].num_batches

    @property
    def num_losses(self) -> int:
        """How often what was known of an engine had to be forgotten because of lost or senseless batches."""
        return sum(subscriber.num_losses for subscriber, _ in self._running.values())


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s ended: %s", task.get_name(), error)
