"""Messages between the registry's process and one worker: frames on a socketpair, 4 bytes of length and MessagePack."""

import asyncio
import socket
from typing import Any, Generic, TypeVar

import msgspec

from services.global_proxy.membership.errors import ChannelClosedError
from services.global_proxy.membership.messages import Message

T = TypeVar("T")

_LENGTH_BYTES = 4
_MAX_FRAME_BYTES = 4 * 1024 * 1024  # a state of 1024 members with the longest addresses has 1.3 MiB


class Channel(Generic[T]):
    """One end. What arrives is of type T."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(received)
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, end: socket.socket, received: Any) -> "Channel[T]":
        """Over one end of a socketpair, which is the channel's from now on. `received` is T."""
        return cls(*await asyncio.open_unix_connection(sock=end), received)

    async def send(self, message: Message) -> None:
        """Send, and wait while the other end is behind with reading.

        Raises:
            ChannelClosedError: there is no other end any more.
        """
        frame = self._encoder.encode(message)
        assert len(frame) <= _MAX_FRAME_BYTES, f"a message of {len(frame)} bytes"
        try:
            self._writer.write(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosedError(f"the other process is gone ({error})") from error

    async def receive(self) -> T | None:
        """The next message, however long that takes; None: the other end is closed.

        Raises:
            ChannelClosedError: what came is no message.
        """
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
            if length > _MAX_FRAME_BYTES:
                raise ChannelClosedError(f"a frame of {length} bytes came, {_MAX_FRAME_BYTES} are allowed")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None
        except msgspec.DecodeError as error:  # with msgspec.ValidationError
            raise ChannelClosedError(f"what came is no message ({error})") from error

    def close(self) -> None:
        """What has not been sent is lost. The socket is closed in the loop's next round."""
        self._writer.transport.abort()
