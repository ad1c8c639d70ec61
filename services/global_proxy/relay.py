"""Passing a stream on, and timing it."""

import time

from services.global_proxy.error_events import ERROR_EVENT, loss_in
from services.global_proxy.http.framing import FramingError
from services.global_proxy.http.reply import Reply
from services.global_proxy.observing.cells import Histogram


class StreamRelay:
    """A sink that gives a client what D sends, as it comes.

    Attributes:
        num_chunks: pieces that D sent; with one token at a time, about its tokens.
        first_s, last_s: when the first and the last piece came, on the monotonic clock.
    """

    def __init__(self, reply: Reply, itl_seconds: Histogram) -> None:
        self.num_chunks = 0
        self.first_s = self.last_s = 0.0
        self._reply = reply
        self._observe = itl_seconds.observe

    def take(self, data: bytes, done: bool) -> None:
        """Raises FramingError: D says that it has failed. Its api server outlives its engine for a moment."""
        self._time()
        if ERROR_EVENT in data and (loss := loss_in(data)) is not None:
            raise FramingError(f"the engine failed in the middle of a stream: {loss!r}")
        self._reply.take(data, done)

    @property
    def seconds_per_chunk(self) -> float | None:
        """After the first; None while there is no second."""
        return (self.last_s - self.first_s) / (self.num_chunks - 1) if self.num_chunks > 1 else None

    def _time(self) -> None:
        now_s = time.monotonic()
        if self.num_chunks:
            self._observe(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.num_chunks += 1
