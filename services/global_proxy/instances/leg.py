"""One request to one instance: counted while it lasts, and charged to the instance if it fails."""

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
        answer = await self._exchange(request)
        if answer.head.status >= 500:
            self.instance.failed(f"status_{answer.head.status}", "server error")
            raise EngineStatusError(self.instance, answer)
        self.instance.answered()
        return answer

    async def _exchange(self, request: bytes) -> EngineAnswer:
        try:
            return await self._exchange_once(request)
        except BrokenOffError as error:
            if not error.unseen or time.monotonic() - self.sent_s > _RACE_S:
                raise self._died(error) from error
        # The engine closed an idle connection just then. On a new one that cannot be.
        try:
            return await self._exchange_once(request, reuse=False)
        except BrokenOffError as error:
            raise self._died(error) from error

    async def _exchange_once(self, request: bytes, reuse: bool = True) -> EngineAnswer:
        endpoint = self.instance.endpoint
        connection = endpoint.idle_connection() if reuse else None
        if connection is None:
            try:
                connection = await endpoint.connect()
            except NoConnectionError as error:
                self.instance.failed("unreachable", error)
                raise UnreachableError(self.instance) from error
        self._connection = connection
        self.sent_s = time.monotonic()
        return await connection.send(request)

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
