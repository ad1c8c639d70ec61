"""Follows one engine's KV events, so that the index has of that engine what the engine has.

1. The connection is there (anew): what was known is forgotten, for the engine may be another. Its numbering begins with
   0.
2. What it has published so far is asked for at its replay endpoint: as far back as it remembers (10,000 batches).
3. From then on each batch must have the number after the last. If some are missing, they are asked for in the same way;
   if it remembers them no more, what was known is forgotten and all that it remembers is asked for.
4. The connection is lost: the engine is taken out of the index. ZeroMQ connects again by itself.

Whatever goes wrong, the index has less than the engine, not more, but for the time a batch is under way.
"""

import asyncio
import logging

import zmq

from services.global_proxy.prefix.errors import MalformedEventError
from services.global_proxy.prefix.events import decode_batch
from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.sockets import ConnectionWatch, Endpoints, drop_queued, open_socket, receive

logger = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 5.0  # between two messages
_END_OF_REPLAY = b"\xff" * 8
_NUM_IN_A_ROW = 64  # batches, before others may run


class Subscriber:
    """One engine. `run` it as a task, and cancel that.

    Attributes:
        num_losses: how often batches were missing that could not be had, or made no sense.
    """

    def __init__(
        self,
        name: str,
        endpoints: Endpoints,
        index: KvEventIndex,
        context: "zmq.Context[zmq.Socket[bytes]]",
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
    ) -> None:
        self.num_losses = 0
        self._name = name
        self._endpoints = endpoints
        self._index = index
        self._context = context
        self._replay_timeout_s = replay_timeout_s
        self._next = 0  # the number of the batch that is due

    @property
    def num_batches(self) -> int:
        """How many the index has, or never will have."""
        return self._next

    async def run(self) -> None:
        """Follow until cancelled. Raises zmq.ZMQError: an endpoint is no address."""
        socket = open_socket(self._context, zmq.SUB, self._endpoints.server_key)
        watch = ConnectionWatch(socket)
        try:
            socket.subscribe(b"")
            socket.connect(self._endpoints.publish)
            async with asyncio.TaskGroup() as tasks:
                following: asyncio.Task[None] | None = None
                while True:
                    is_connected = await watch.next_change()
                    if following is not None:
                        following.cancel()
                        await asyncio.wait([following])
                        following = None
                    self._index.remove(self._name)
                    if is_connected:
                        following = tasks.create_task(self._follow(socket))
                    logger.info("KV events of %s: %s", self._name, "connected" if is_connected else "connection lost")
        finally:
            self._index.remove(self._name)
            watch.close()
            socket.close()

    async def _follow(self, socket: "zmq.Socket[bytes]") -> None:
        """From the connection's beginning to its end."""
        drop_queued(socket)  # of the connection before
        self._index.add(self._name)
        self._next = 0
        await self._catch_up()
        while True:
            for _ in range(_NUM_IN_A_ROW):
                await self._take(await receive(socket))
            await asyncio.sleep(0)

    async def _take(self, frames: list[bytes]) -> None:
        """One published batch."""
        if len(frames) != 3 or len(frames[1]) != 8:
            self._lose("what came is no batch of KV events")
            return
        number = int.from_bytes(frames[1], "big")
        if number > self._next:
            await self._catch_up()
            if number > self._next:
                self._lose(f"batches {self._next} to {number - 1} are gone")
        if number >= self._next:
            self._apply(number, frames[2])

    def _apply(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        try:
            self._index.apply(self._name, decode_batch(payload))
        except MalformedEventError as error:
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        """Forget what is known: it would get wrong and stay so."""
        self.num_losses += 1
        self._index.clear(self._name)
        logger.warning("KV events of %s: %s; what was known of its prefix cache is forgotten", self._name, reason)

    async def _catch_up(self) -> None:
        """Have all repeated from the batch that is due on; in several goes, if ZeroMQ drops some of that too."""
        if self._endpoints.replay is None:
            return
        is_complete = False
        while not is_complete:
            due = self._next
            is_complete = await self._replay(self._endpoints.replay)
            if not is_complete and self._next == due:
                logger.warning("KV events of %s: %s repeats nothing", self._name, self._endpoints.replay)
                return

    async def _replay(self, endpoint: str) -> bool:
        """Ask once. Returns whether all came that the engine remembers."""
        socket = open_socket(self._context, zmq.DEALER, self._endpoints.server_key)
        try:
            socket.connect(endpoint)
            socket.send_multipart([b"", self._next.to_bytes(8, "big")], zmq.NOBLOCK)
            is_first = True
            while True:
                async with asyncio.timeout(self._replay_timeout_s):
                    frames = await receive(socket)
                if len(frames) != 4 or len(frames[2]) != 8:
                    return False
                if frames[2] == _END_OF_REPLAY:
                    return True
                number = int.from_bytes(frames[2], "big")
                if number > self._next:
                    if not is_first:
                        return False
                    if self._next:
                        self._lose(f"batches {self._next} to {number - 1} are no longer remembered")
                if number >= self._next:
                    self._apply(number, frames[3])
                    is_first = False
                    if number % _NUM_IN_A_ROW == 0:
                        await asyncio.sleep(0)
        except TimeoutError:
            return False
        finally:
            socket.close()
