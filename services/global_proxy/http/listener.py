"""Accepting connections, as long as there is room for more."""

import asyncio
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5  # without room; meanwhile the kernel keeps who waits
_YIELD_S = 0.002  # for another worker to take what comes
_ACCEPTS_A_TURN = 64
_TLS_HANDSHAKE_S = 10.0


class Accepted(Protocol):
    """A protocol that calls `on_lost` when its connection, once made, has ended."""

    on_lost: Callable[[], None]


class Listener:
    """Accepts on a listening socket, which several processes may share.

    asyncio's own server tries again at once when there are no file descriptors left, or hangs up on the newcomer. Half
    of the descriptors are for clients, so that these cannot keep the proxy from reaching the engines.

    Args:
        make_protocol: makes an asyncio.Protocol.
        is_ahead: whether another process should rather have the next connection. It then has a moment to take it.
        count: told 1 for each connection, and -1 at its end.

    Attributes:
        num_connections: accepted and not yet ended.
    """

    def __init__(
        self,
        sock: socket.socket,
        make_protocol: Callable[[], Accepted],
        tls: ssl.SSLContext | None = None,
        is_ahead: Callable[[], bool] = lambda: False,
        count: Callable[[int], None] = lambda n: None,
    ) -> None:
        sock.setblocking(False)
        self.num_connections = 0
        self._sock = sock
        self._make_protocol = make_protocol
        self._tls = tls
        self._is_ahead = is_ahead
        self._count = count
        num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_connections = sys.maxsize if num_files == resource.RLIM_INFINITY else num_files // 2
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._listen()

    def close(self) -> None:
        """Accept no more. The socket stays open, for it may not be ours alone."""
        self._rest()
        if self._timer is not None:
            self._timer.cancel()
        for handshake in self._handshakes:
            handshake.cancel()

    def _listen(self) -> None:
        self._loop.add_reader(self._sock, self._accept_some)

    def _rest(self) -> None:
        self._loop.remove_reader(self._sock)

    def _accept_some(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._is_ahead():
                self._rest()
                self._timer = self._loop.call_later(_YIELD_S, self._accept_unasked)
                return
            if not self._accept():
                return

    def _accept_unasked(self) -> None:
        """The other may be busy, or dead."""
        self._listen()
        self._accept()

    def _accept(self) -> bool:
        """Whether there was a connection, and room for it."""
        if self.num_connections >= self._max_connections:
            self._pause(f"{self.num_connections} connections take half of the file descriptors (ulimit -n)")
            return False
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:
            self._pause(str(error))
            return False
        self.num_connections += 1
        self._count(1)
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._connect(sock))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)
        return True

    async def _connect(self, sock: socket.socket) -> None:
        handshake_s = None if self._tls is None else _TLS_HANDSHAKE_S
        try:
            await self._loop.connect_accepted_socket(self._make, sock, ssl=self._tls, ssl_handshake_timeout=handshake_s)
        except (OSError, TimeoutError) as error:  # a stranger to TLS, or one who left
            logger.debug("no connection was made: %s", error)
            sock.close()
            self._lost()

    def _make(self) -> asyncio.Protocol:
        protocol = self._make_protocol()
        protocol.on_lost = self._lost
        assert isinstance(protocol, asyncio.Protocol)
        return protocol

    def _lost(self) -> None:
        self.num_connections -= 1
        self._count(-1)

    def _pause(self, why: str) -> None:
        logger.warning("accepting no connections for %g s: %s", _PAUSE_S, why)
        self._rest()
        self._timer = self._loop.call_later(_PAUSE_S, self._listen)
