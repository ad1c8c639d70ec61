"""One TCP connection between a worker of P and one of D: messages, and the buffers that follow them.

A message is a length (4 bytes, little-endian) and msgpack. Buffers may follow one, as its kind says.
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

from kv_transfer import protocol
from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.protocol import MAX_FRAME_BYTES, Refused, Reply, Request

_BUFFERS_PER_CALL = 1024  # the system's IOV_MAX
_BYTES_PER_CALL = 16 << 20
_LONGEST_CALL_S = 1.0  # between two looks at the clock
_SOCKET_OPTIONS = (  # the end of a peer's machine is noticed after a minute, though nothing is sent
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
_HEADER = struct.Struct("<I")
_TIMEVAL = struct.Struct("ll")


class RankConnection:
    """Either end of one connection. Its socket blocks, with the system's own time limits: one call moves many buffers.

    Every method raises DeadlineError, PeerUnreachableError or ProtocolError.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.settimeout(None)
        for option in _SOCKET_OPTIONS:
            connection.setsockopt(*option)
        self._socket = connection
        self._peer = peer
        self._limits_s: dict[int, float] = {}  # the system's, by option

    def send(self, message: Request | Reply, deadline: float, buffers: Sequence[memoryview] = ()) -> None:
        """A message, and the buffers that follow it."""
        data = protocol.encode(message)
        self.send_buffers([memoryview(_HEADER.pack(len(data)) + data), *buffers], deadline)

    def send_buffers(self, buffers: Sequence[memoryview], deadline: float) -> None:
        self._move(buffers, deadline, socket.SO_SNDTIMEO, self._socket.sendmsg)

    def receive_into(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill the buffers."""
        self._move(buffers, deadline, socket.SO_RCVTIMEO, self._receive_all)

    def receive_request(self, deadline: float, max_bytes: int = MAX_FRAME_BYTES) -> Request:
        return protocol.decode_request(self._receive_frame(deadline, max_bytes))

    def receive_reply(self, deadline: float, max_bytes: int = MAX_FRAME_BYTES) -> Reply:
        """Raises PeerRefusedError too: the peer said no."""
        reply = protocol.decode_reply(self._receive_frame(deadline, max_bytes))
        if isinstance(reply, Refused):
            raise PeerRefusedError(f"{self._peer}: {reply.why}")
        return reply

    def wait_for_more(self) -> bool:
        """Sleep, without a limit, until something arrives; False when the peer has closed instead."""
        waiting = select.poll()
        try:
            waiting.register(self._socket, select.POLLIN)
            waiting.poll()
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except (OSError, ValueError):  # ValueError: closed
            return False

    @property
    def is_quiet(self) -> bool:
        """Whether the connection is open and has nothing to say: the state between two requests."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut_down(self) -> None:
        """Wake the thread that uses this connection, with an error. Safe from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _receive_frame(self, deadline: float, max_bytes: int) -> bytearray:
        header = bytearray(_HEADER.size)
        self.receive_into([memoryview(header)], deadline)
        (size,) = _HEADER.unpack(header)
        if size > max_bytes:
            raise ProtocolError(f"{self._peer}: a message of {size} bytes; at most {max_bytes} are taken")
        frame = bytearray(size)
        self.receive_into([memoryview(frame)], deadline)
        return frame

    def _receive_all(self, buffers: Sequence[memoryview]) -> int:
        received = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        if received == 0:
            raise PeerUnreachableError(f"{self._peer} closed the connection")
        return received

    def _move(
        self, buffers: Sequence[memoryview], deadline: float, option: int, move: Callable[[list[memoryview]], int]
    ) -> None:
        pending = [buffer for buffer in buffers if len(buffer)]
        start = 0
        while start < len(pending):
            self._limit(option, deadline)
            try:
                start = _skip(pending, start, move(pending[start : _batch_end(pending, start)]))
            except BlockingIOError:  # the system's time limit: look at the clock
                continue
            except OSError as error:
                raise PeerUnreachableError(f"{self._peer}: {error}") from None

    def _limit(self, option: int, deadline: float) -> None:
        """Let no call to the system last longer than until the deadline, or than is good without a look at it."""
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineError(f"{self._peer}: the deadline passed while bytes were moved")
        limit_s = min(remaining_s, _LONGEST_CALL_S)
        if limit_s != self._limits_s.get(option):  # mostly it is the longest, as before
            microseconds = max(1, int(limit_s * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))
            self._limits_s[option] = limit_s


def _batch_end(pending: Sequence[memoryview], start: int) -> int:
    """How far one call to the system reaches."""
    end, num_bytes = start, 0
    limit = min(len(pending), start + _BUFFERS_PER_CALL)
    while end < limit and num_bytes < _BYTES_PER_CALL:
        num_bytes += len(pending[end])
        end += 1
    return end


def _skip(pending: list[memoryview], start: int, num_bytes: int) -> int:
    """Drop `num_bytes` from the front of pending[start:]; returns the new start."""
    while num_bytes:
        size = len(pending[start])
        if num_bytes < size:
            pending[start] = pending[start][num_bytes:]
            return start
        num_bytes -= size
        start += 1
    return start
