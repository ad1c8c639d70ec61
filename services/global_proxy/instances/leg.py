"""One request to one instance: counted while it lasts, and charged to the instance if it fails."""

import asyncio
import time

from services.global_proxy.errors import DiedError, EngineStatusError, UnreachableError
from services.global_proxy.http.engine_connection import BrokenOffError, EngineAnswer, EngineConnection, Sink
from services.global_proxy.http.engine_endpoint import NoConnectionError
from services.global_proxy.instances.instance import Instance

_RACE_S = 0.1  # how long after sending a request it may turn out that the engine had just closed the connection


class Leg:
    """Counted from here until `close`, which must be called however it ends; without an await since it was chosen.

    Attributes:
        sent_s: when the request was written, on the monotonic clock.
    """

    def __init__(self, instance: Instance, num_tokens: int) -> None:
        self.instance = instance
        self.sent_s = 0.0
        self._num_tokens = num_tokens
        self._connection: EngineConnection | None = None
        instance.begin(num_tokens)

    async def send(self, request: bytes) -> EngineAnswer:
        """The engine's answer, or the beginning of its stream. Whether a whole answer makes sense, the caller says.

        Raises:
            UnreachableError: no connection was made: nothing ran there.
            DiedError: the connection broke.
            EngineStatusError: the engine failed with 5xx; has the answer.
        """
        connection = self.instance.endpoint.idle_connection() or await self._connect()
        try:
            answer = await self._send_on(connection, request)
        except BrokenOffError as error:
            answer = await self._send_again(request, error)
        if answer.head.status >= 500:
            self.instance.failed(f"status_{answer.head.status}", "server error")
            raise EngineStatusError(self.instance, answer)
        self.instance.answered()
        return answer

    def _send_on(self, connection: EngineConnection, request: bytes) -> asyncio.Future[EngineAnswer]:
        self._connection = connection
        self.sent_s = time.monotonic()
        return connection.send(request)

    async def _send_again(self, request: bytes, error: BrokenOffError) -> EngineAnswer:
        """The engine may have closed an idle connection just then; on a new one that cannot be. Raises as `send`."""
        if not error.unseen or time.monotonic() - self.sent_s > _RACE_S:
            raise self._died(error) from error
        connection = await self._connect()
        try:
            return await self._send_on(connection, request)
        except BrokenOffError as another:
            raise self._died(another) from another

    async def _connect(self) -> EngineConnection:
        """Raises UnreachableError."""
        try:
            return await self.instance.endpoint.connect()
        except NoConnectionError as error:
            self.instance.failed("unreachable", error)
            raise UnreachableError(self.instance) from error

    async def relay_to(self, sink: Sink) -> None:
        """Give the stream to `sink`, to its end. Raises DiedError."""
        assert self._connection is not None, "a stream has begun"
        try:
            await self._connection.relay_to(sink)
        except BrokenOffError as error:
            raise self._died(error) from error
        self.instance.succeeded()

    @property
    def connection(self) -> EngineConnection:
        assert self._connection is not None, "a stream has begun"
        return self._connection

    def close(self) -> None:
        """Stop counting. An answer that was not read to its end is broken off, which aborts the request there."""
        if self._connection is not None:
            self.instance.endpoint.give_back(self._connection)
            self._connection = None
        self.instance.end(self._num_tokens)

    def _died(self, error: BrokenOffError) -> DiedError:
        self.instance.failed("died", error)
        return DiedError(self.instance)
