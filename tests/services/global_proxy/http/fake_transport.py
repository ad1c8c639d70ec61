"""A transport without a socket."""

import asyncio
from typing import Any


class FakeTransport(asyncio.Transport):
    """Keeps what is written. `lost` is what the event loop does after `abort`."""

    def __init__(self, protocol: asyncio.Protocol | None = None) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading = True
        self.aborted = False
        self.closing = False
        self._protocol = protocol
        if protocol is not None:
            protocol.connection_made(self)

    def lost(self) -> None:
        assert self._protocol is not None
        self._protocol.connection_lost(None)

    def taken(self) -> bytes:
        """What was written since the last call."""
        written = bytes(self.written)
        self.written.clear()
        return written

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.closing = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert self.reading, "asyncio raises here"
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def abort(self) -> None:
        self.aborted = self.closing = True

    def close(self) -> None:
        self.closing = True
