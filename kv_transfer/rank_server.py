"""The rank server: each worker of P answers workers of D over TCP, once both have proven the deployment key.

    D → P  Connect(nonce)            P → D  Challenge(nonce, proof over both nonces)
    D → P  Proof(proof, run_id)      then requests, each answered by the handler of its kind

Connections stay open between requests; each has a thread in P and is used by one thread at a time in D.
"""

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from kv_transfer.dropped import DropCounter
from kv_transfer.errors import (
    AuthError,
    DeadlineError,
    KVTransferError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.protocol import Challenge, Connect, Proof, RankEndpoint, Refused
from kv_transfer.rank_connection import RankConnection

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 1024
_MAX_STRANGERS = 64  # connections whose peer has not proven the key yet
_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_HANDSHAKE_BYTES = 1024
_PEER_TIMEOUT_S = 30.0  # a reader that takes nothing, or does not finish its request, for so long is lost
_CLOSE_TIMEOUT_S = 2.0

Handler = Callable[[RankConnection, Any], None]


class RankServer:
    """P's side: listens from the start, serves once `start` is called.

    Args:
        host: address to listen on; the port is the system's choice.
        key: what every peer must hold.
    """

    def __init__(self, host: str, key: DeploymentKey) -> None:
        self._key = key
        self._handlers: dict[type[Any], Handler] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.dropped = DropCounter("KV rank server")
        self._serving: dict[RankConnection, threading.Thread] = {}
        self._strangers: dict[RankConnection, None] = {}  # of these, in the order in which they came
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.endpoint = RankEndpoint(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._accepting = threading.Thread(target=self._accept, name="kv-rank-accept", daemon=True)

    def handle(self, kind: type[Any], handler: Handler) -> None:
        """Let `handler(connection, request)` answer requests of this kind; what it raises ends the connection."""
        self._handlers[kind] = handler

    def start(self) -> None:
        self._accepting.start()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._serving.values())
            for connection in self._serving:
                connection.shut_down()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        if self._accepting.is_alive():
            threads.append(self._accepting)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, address = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of file descriptors: connections wait in the backlog until some are closed
                continue
            try:
                self._start_serving(RankConnection(accepted, f"{address[0]}:{address[1]}"))
            except (OSError, RuntimeError):  # it has gone already; or the system has no more threads
                accepted.close()

    def _start_serving(self, connection: RankConnection) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="kv-rank", daemon=True)
        with self._lock:
            if self._closed or len(self._serving) >= _MAX_CONNECTIONS:
                connection.close()
                return
            thread.start()
            self._serving[connection] = thread
            self._strangers[connection] = None
            if len(self._strangers) > _MAX_STRANGERS:
                # A flood of them keeps no peer out: those who hold the key prove it before so many others have come.
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.shut_down()

    def _serve(self, connection: RankConnection) -> None:
        try:
            self._let_in(connection)
            with self._lock:
                self._strangers.pop(connection, None)
            while connection.wait_for_more():
                request = connection.receive_request(time.monotonic() + _PEER_TIMEOUT_S)
                handler = self._handlers.get(type(request))
                if handler is None:
                    raise ProtocolError(f"{type(request).__name__} does not belong on a rank server")
                handler(connection, request)
        except (ProtocolError, AuthError, DeadlineError) as error:
            self.dropped.count(error)
        except (KVTransferError, OSError):
            pass  # the peer left, or means another run of this engine
        except Exception:
            logger.exception("a request to the KV rank server failed")
        finally:
            with self._lock:
                self._serving.pop(connection, None)
                self._strangers.pop(connection, None)
            connection.close()

    def _let_in(self, connection: RankConnection) -> None:
        deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
        hello = connection.receive_request(deadline, _MAX_HANDSHAKE_BYTES)
        if not isinstance(hello, Connect):
            raise ProtocolError(f"{type(hello).__name__} before the handshake")
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.send(Challenge(nonce, self._key.mac("rank-server", hello.nonce, nonce)), deadline)
        answer = connection.receive_request(deadline, _MAX_HANDSHAKE_BYTES)
        if not isinstance(answer, Proof):
            raise ProtocolError(f"{type(answer).__name__} instead of a proof")
        if not self._key.is_mac(answer.proof, "rank-client", hello.nonce, nonce, answer.run_id.encode()):
            connection.send(Refused("the deployment keys differ"), deadline)
            raise AuthError("a peer does not hold the deployment key")
        if answer.run_id != self.endpoint.run_id:
            connection.send(Refused("this engine was restarted since the hand-off"), deadline)
            raise PeerRefusedError("a peer asked for an earlier run of this engine")


class RankClient:
    """D's side: open connections to rank servers, kept for the next request."""

    def __init__(self, key: DeploymentKey) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[RankEndpoint, list[RankConnection]] = {}
        self._in_use: set[RankConnection] = set()

    @contextlib.contextmanager
    def connection(self, peer: RankEndpoint, deadline: float) -> Iterator[RankConnection]:
        """A connection to this run of the peer, for one exchange at least. It is kept only if that raised nothing.

        Raises:
            PeerUnreachableError, DeadlineError, ProtocolError, PeerRefusedError.
            AuthError: the peer does not hold the deployment key.
        """
        connection = self._take(peer) or self._open(peer, deadline)
        try:
            yield connection
        except BaseException:
            with self._lock:
                self._in_use.discard(connection)
            connection.close()
            raise
        with self._lock:
            self._in_use.discard(connection)
            if not self._closed:
                self._idle.setdefault(peer, []).append(connection)
                return
        connection.close()

    def forget(self, peer: RankEndpoint) -> None:
        """Close the peer's connections that are not in use."""
        with self._lock:
            idle = self._idle.pop(peer, [])
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close every connection; exchanges under way fail."""
        with self._lock:
            self._closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
            for connection in self._in_use:
                connection.shut_down()
        for connection in idle:
            connection.close()

    def _take(self, peer: RankEndpoint) -> RankConnection | None:
        with self._lock:
            self._close_dead()
            idle = self._idle.get(peer)
            if not idle:
                return None
            connection = idle.pop()
            self._in_use.add(connection)
            return connection

    def _close_dead(self) -> None:
        """Close idle connections whose peer has gone: nobody may ever ask for that peer again. Needs the lock."""
        for peer, idle in list(self._idle.items()):
            for connection in [connection for connection in idle if not connection.is_quiet]:
                idle.remove(connection)
                connection.close()
            if not idle:
                del self._idle[peer]

    def _open(self, peer: RankEndpoint, deadline: float) -> RankConnection:
        name = f"{peer.host}:{peer.port}"
        deadline = min(deadline, time.monotonic() + _HANDSHAKE_TIMEOUT_S)
        timeout_s = deadline - time.monotonic()
        if timeout_s <= 0:
            raise DeadlineError(f"no time left to connect to {name}")
        try:
            connection = RankConnection(socket.create_connection((peer.host, peer.port), timeout=timeout_s), name)
        except TimeoutError:
            raise DeadlineError(f"{name} did not accept a connection in time") from None
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
            raise PeerUnreachableError(f"{name}: {error}") from None
        try:
            self._introduce(connection, peer, deadline)
            with self._lock:
                if self._closed:
                    raise PeerUnreachableError("this engine is shutting down")
                self._in_use.add(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _introduce(self, connection: RankConnection, peer: RankEndpoint, deadline: float) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.send(Connect(nonce), deadline)
        challenge = connection.receive_reply(deadline, _MAX_HANDSHAKE_BYTES)
        if not isinstance(challenge, Challenge):
            raise ProtocolError(f"{type(challenge).__name__} instead of a challenge")
        if not self._key.is_mac(challenge.proof, "rank-server", nonce, challenge.nonce):
            raise AuthError(f"{peer.host}:{peer.port} does not hold this deployment's key: give both sides the same")
        proof = self._key.mac("rank-client", nonce, challenge.nonce, peer.run_id.encode())
        connection.send(Proof(proof, peer.run_id), deadline)
