"""KV blocks over TCP, from KV cache memory to KV cache memory without a copy in Python.

P answers each connection from a thread of its own with gathering sends; D receives with scattering reads. Both release
the interpreter's lock while bytes move.
"""

import contextlib
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Sequence

from kv_transfer import protocol
from kv_transfer.errors import ChecksumError, DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.memory import BlockMemory
from kv_transfer.protocol import FRAME_HEADER, BlocksFollow, RankEndpoint, ReadBlocks, Refused
from kv_transfer.transports.base import Transport

_BUFFERS_PER_CALL = 512  # below the system's IOV_MAX, 1024
_MAX_CONNECTIONS = 256
_PEER_TIMEOUT_S = 30.0  # a reader that takes nothing, or does not finish its request, for so long is lost
_CONNECT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_SOCKET_OPTIONS = (  # the end of a peer's machine is noticed after a minute, though nothing is sent
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class TcpTransport(Transport):
    """Args:
    memory: what is served and read into.
    checksum: ask the peer for a CRC-32 of what it sends, and compare it with what arrived.
    """

    def __init__(self, memory: BlockMemory, *, checksum: bool = False) -> None:
        super().__init__(memory)
        self._checksum = checksum
        self._lock = threading.Lock()
        self._closed = False
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._reading: set[socket.socket] = set()
        self._idle: dict[RankEndpoint, list[socket.socket]] = {}

    # --- serving: P

    def serve(self, host: str) -> RankEndpoint:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family)
        endpoint = RankEndpoint(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener, endpoint.run_id), name="kv-blocks-accept", daemon=True
        )
        self._accepting.start()
        return endpoint

    def _accept(self, listener: socket.socket, run_id: str) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of file descriptors: connections wait in the backlog until some are closed
                continue
            if not self._start_serving(connection, run_id):
                connection.close()

    def _start_serving(self, connection: socket.socket, run_id: str) -> bool:
        thread = threading.Thread(
            target=self._serve_connection, args=(connection, run_id), name="kv-blocks", daemon=True
        )
        with self._lock:
            if self._closed or len(self._serving) >= _MAX_CONNECTIONS:
                return False
            self._serving[connection] = thread
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads
                del self._serving[connection]
                return False
        return True

    def _serve_connection(self, connection: socket.socket, run_id: str) -> None:
        try:
            _set_options(connection)
            while True:
                connection.settimeout(None)  # between reads a connection may rest
                if not connection.recv(1, socket.MSG_PEEK):
                    return
                frame = _receive_frame(connection, time.monotonic() + _PEER_TIMEOUT_S)
                request = protocol.decode_request(frame)
                connection.settimeout(_PEER_TIMEOUT_S)
                self._answer(connection, request, run_id)
        except (OSError, ProtocolError, PeerUnreachableError):
            pass  # the peer left or does not speak our protocol: the connection ends, the engine does not
        finally:
            with self._lock:
                self._serving.pop(connection, None)
            connection.close()

    def _answer(self, connection: socket.socket, request: protocol.Request, run_id: str) -> None:
        if not isinstance(request, ReadBlocks):
            raise ProtocolError(f"{type(request).__name__} on a block connection")
        if request.run_id != run_id:
            _send_frame(connection, Refused("this engine was restarted since the hand-off"))
            return
        try:
            buffers = self.memory.buffers(request.block_ids)
        except IndexError as error:
            _send_frame(connection, Refused(str(error)))
            return
        _send_frame(connection, BlocksFollow(sum(map(len, buffers))))
        _send_all(connection, buffers)
        if request.checksum:
            connection.sendall(_crc32(buffers))

    # --- reading: D

    def read(self, peer: RankEndpoint, remote_ids: Sequence[int], local_ids: Sequence[int], deadline: float) -> int:
        assert len(remote_ids) == len(local_ids)
        buffers = self.memory.buffers(local_ids)
        num_bytes = sum(map(len, buffers))
        connection = self._take_connection(peer, deadline)
        try:
            _set_deadline(connection, deadline)
            _send_frame(connection, ReadBlocks(peer.run_id, tuple(remote_ids), self._checksum))
            reply = protocol.decode_reply(_receive_frame(connection, deadline))
            if isinstance(reply, Refused):
                raise PeerRefusedError(reply.why)
            if not isinstance(reply, BlocksFollow) or reply.num_bytes != num_bytes:
                raise ProtocolError(f"{reply} in answer to a read of {num_bytes} bytes")
            _receive_into(connection, buffers, deadline)
            if self._checksum:
                self._verify(connection, buffers, deadline)
        except TimeoutError:
            self._drop(connection)
            raise DeadlineError(f"reading {num_bytes} bytes from {peer.host}:{peer.port} did not end in time") from None
        except OSError as error:
            self._drop(connection)
            raise PeerUnreachableError(f"{peer.host}:{peer.port}: {error}") from None
        except BaseException:
            self._drop(connection)
            raise
        self._give_back(peer, connection)
        return num_bytes

    @staticmethod
    def _verify(connection: socket.socket, buffers: Sequence[memoryview], deadline: float) -> None:
        sent = bytearray(4)
        _receive_into(connection, [memoryview(sent)], deadline)
        if _crc32(buffers) != bytes(sent):
            raise ChecksumError("the bytes that arrived are not the bytes that were sent")

    def _take_connection(self, peer: RankEndpoint, deadline: float) -> socket.socket:
        with self._lock:
            self._close_dead()
            idle = self._idle.get(peer)
            connection = idle.pop() if idle else None
            if connection is not None:
                self._reading.add(connection)
                return connection
        timeout_s = min(deadline - time.monotonic(), _CONNECT_TIMEOUT_S)
        if timeout_s <= 0:
            raise DeadlineError(f"no time left to connect to {peer.host}:{peer.port}")
        try:
            connection = socket.create_connection((peer.host, peer.port), timeout=timeout_s)
        except TimeoutError:
            raise DeadlineError(f"{peer.host}:{peer.port} did not accept a connection in time") from None
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
            raise PeerUnreachableError(f"{peer.host}:{peer.port}: {error}") from None
        _set_options(connection)
        with self._lock:
            if not self._closed:
                self._reading.add(connection)
                return connection
        connection.close()
        raise PeerUnreachableError("this engine is shutting down")

    def _close_dead(self) -> None:
        """Close idle connections whose peer has gone: nobody may ever ask for that peer again. Needs the lock."""
        for peer, idle in list(self._idle.items()):
            for connection in [connection for connection in idle if not _is_quiet(connection)]:
                idle.remove(connection)
                connection.close()
            if not idle:
                del self._idle[peer]

    def _give_back(self, peer: RankEndpoint, connection: socket.socket) -> None:
        with self._lock:
            self._reading.discard(connection)
            if not self._closed:
                self._idle.setdefault(peer, []).append(connection)
                return
        connection.close()

    def _drop(self, connection: socket.socket) -> None:
        with self._lock:
            self._reading.discard(connection)
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
            threads = list(self._serving.values())
            for connection in [*self._serving, *self._reading]:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that uses it, which closes it
        for connection in idle:
            connection.close()
        if self._listener is not None and self._accepting is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            threads.append(self._accepting)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if self._listener is not None:
            self._listener.close()


def _set_options(connection: socket.socket) -> None:
    for option in _SOCKET_OPTIONS:
        connection.setsockopt(*option)


def _is_quiet(connection: socket.socket) -> bool:
    """Whether the connection is open and has nothing to say: the state between two reads."""
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _set_deadline(connection: socket.socket, deadline: float) -> None:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    connection.settimeout(remaining_s)


def _send_frame(connection: socket.socket, message: protocol.Request | protocol.Reply) -> None:
    data = protocol.encode(message)
    connection.sendall(FRAME_HEADER.pack(len(data)) + data)


def _receive_frame(connection: socket.socket, deadline: float) -> bytearray:
    """One length-prefixed message."""
    header = bytearray(FRAME_HEADER.size)
    _receive_into(connection, [memoryview(header)], deadline)
    (size,) = FRAME_HEADER.unpack(header)
    if size > protocol.MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {size} bytes; at most {protocol.MAX_FRAME_BYTES} are taken")
    frame = bytearray(size)
    _receive_into(connection, [memoryview(frame)], deadline)
    return frame


def _receive_into(connection: socket.socket, buffers: Sequence[memoryview], deadline: float) -> None:
    pending = [buffer for buffer in buffers if len(buffer)]
    start = 0
    while start < len(pending):
        _set_deadline(connection, deadline)
        received = connection.recvmsg_into(pending[start : start + _BUFFERS_PER_CALL])[0]
        if received == 0:
            raise PeerUnreachableError("the peer closed the connection before it had answered")
        start = _skip(pending, start, received)


def _send_all(connection: socket.socket, buffers: Sequence[memoryview]) -> None:
    pending = list(buffers)
    start = 0
    while start < len(pending):
        start = _skip(pending, start, connection.sendmsg(pending[start : start + _BUFFERS_PER_CALL]))


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


def _crc32(buffers: Sequence[memoryview]) -> bytes:
    crc = 0
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc.to_bytes(4, "little")
