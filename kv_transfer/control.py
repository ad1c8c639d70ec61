"""The control channel: D asks P's scheduler process who it is, extends leases and tells it when a read has ended.

Connections are CurveZMQ's, with keys made from the deployment key: without it nothing can be asked, answered, changed
on the way or repeated, and a stranger's bytes do not get past the handshake. A question is two frames, a nonce and a
request; so is the answer, with the question's nonce.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import zmq
from zmq.utils import z85

from kv_transfer import protocol
from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from kv_transfer.dropped import DropCounter
from kv_transfer.errors import AuthError, DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.prefill.lease import LeaseTable
from kv_transfer.protocol import (
    EndLease,
    EndRead,
    ExtendLease,
    Fingerprint,
    Hello,
    LeasesExtended,
    ReadEnded,
    Refused,
    Welcome,
)

logger = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 3600.0  # zmq counts milliseconds in 32 bits
_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_WAITING = 16  # messages of one peer, each way, before more are held back or dropped: peers ask one at a time
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NO_CONNECTION = "no connection: nobody is there, or whoever is has another deployment key"
_CONNECTION_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _HANDSHAKE_FAILED


class ControlServer:
    """P's side, one thread: answers peers and expires leases. It sleeps until a message or an expiry is due.

    Args:
        host: address to listen on.
        port: 0 for the system's choice.
        key: what every peer must hold.
        welcome: the answer to a compatible peer.
        fingerprint: ours.
        leases: shared with the scheduler's thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        key: DeploymentKey,
        welcome: Welcome,
        fingerprint: Fingerprint,
        leases: LeaseTable,
    ) -> None:
        self._welcome = welcome
        self._fingerprint = fingerprint
        self._leases = leases
        self.dropped = DropCounter("KV control port")
        self._lock = threading.Lock()
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _open_socket(self._context, zmq.ROUTER, host)
        self._socket.curve_server = True
        self._socket.curve_secretkey = _secret_key(key)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 16)
        self._socket.setsockopt(zmq.SNDTIMEO, 0)  # a peer that reads nothing loses its answer, not our thread
        self._failed_handshakes = self._socket.get_monitor_socket(_HANDSHAKE_FAILED)
        try:
            self._socket.bind(_address(host, port))
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._thread = threading.Thread(target=self._run, name="kv-control", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at the leases again: a first one was granted. Safe from any thread."""
        with self._lock:
            if not self._stopping:  # afterwards the number may be another file's
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            os.eventfd_write(self._wake_fd, 1)
        self._thread.join(timeout=5)
        os.close(self._wake_fd)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._failed_handshakes, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        while not self._stopping:
            timeout_s = self._leases.seconds_to_expiry()
            ready = dict(poller.poll(None if timeout_s is None else int(min(timeout_s, _LONGEST_SLEEP_S) * 1000) + 1))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._failed_handshakes in ready:
                self._failed_handshakes.recv_multipart()
                self.dropped.count(AuthError("a peer does not hold the deployment key"))
            if self._socket in ready:
                self._serve_one()
            self._leases.expire()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._failed_handshakes.close()
        self._socket.close()
        self._context.term()

    def _serve_one(self) -> None:
        try:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            if len(frames) != 2 or len(frames[0]) != NONCE_BYTES:
                raise ProtocolError("not a nonce and a request")
            nonce, request = frames
            reply = protocol.encode(self._answer(protocol.decode_request(request)))
            self._socket.send_multipart([identity, nonce, reply])
        except Exception as error:  # whatever a peer sends, this thread lives on: it also expires the leases
            self.dropped.count(error)

    def _answer(self, request: protocol.Request) -> protocol.Reply:
        match request:
            case Hello(fingerprint):
                differences = self._fingerprint.differences(fingerprint)
                if not differences:
                    return self._welcome
                why = (
                    f"prefill and decode do not fit: {'; '.join(differences)} (here: prefill; there: decode). "
                    "Start both from one deployment file"
                )
                logger.error("refused a peer: %s", why)
                return Refused(why)
            case ExtendLease(lease_ids):
                return LeasesExtended(tuple(self._leases.extend(lease_ids)))
            case EndRead(lease_id, reader, rank, num_ranks):
                return ReadEnded(self._leases.end_read(lease_id, reader, rank, num_ranks))
            case EndLease(lease_id):
                return ReadEnded(self._leases.end(lease_id))
        return Refused(f"{type(request).__name__} does not belong on the control port")


class ControlClient:
    """D's side: one question at a time, each with a deadline. One thread at a time may use it.

    A connection that ends is not made again behind our back: whoever waits is told at once, and nothing keeps trying
    to reach a peer that may never come back.

    Args:
        context: outlives the client.
        key: the deployment's.
        host, port: P's control server, as the hand-off names it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: DeploymentKey, host: str, port: int) -> None:
        self._context = context
        self._key = key
        self._host = host
        self._address = _address(host, port)
        self._socket: zmq.Socket[bytes] | None = None
        self._ends: zmq.Socket[bytes] | None = None  # tells when the connection has ended, or was not made

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that has not ended, as far as this side knows."""
        return self._ends is not None and not self._ends.poll(0)

    def greet(self, fingerprint: Fingerprint, deadline: float) -> Welcome:
        """Raises PeerRefusedError, DeadlineError, ProtocolError, PeerUnreachableError."""
        reply = self._ask(Hello(fingerprint), deadline)
        if not isinstance(reply, Welcome):
            raise ProtocolError(f"{reply} in answer to a greeting")
        return reply

    def extend_leases(self, lease_ids: Sequence[str], deadline: float) -> tuple[str, ...]:
        """Those of them that are open. Raises like `greet`."""
        reply = self._ask(ExtendLease(tuple(lease_ids)), deadline)
        if not isinstance(reply, LeasesExtended):
            raise ProtocolError(f"{reply} in answer to an extension")
        return reply.lease_ids

    def end_read(self, end: EndRead, deadline: float) -> bool:
        """Whether the lease held until now. Raises like `greet`."""
        reply = self._ask(end, deadline)
        if not isinstance(reply, ReadEnded):
            raise ProtocolError(f"{reply} in answer to the end of a read")
        return reply.valid

    def end_lease(self, lease_id: str, deadline: float) -> bool:
        """Whether the lease was open. Raises like `greet`."""
        reply = self._ask(EndLease(lease_id), deadline)
        if not isinstance(reply, ReadEnded):
            raise ProtocolError(f"{reply} in answer to the end of a lease")
        return reply.valid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            with suppress(zmq.ZMQError):  # the context has ended
                self._socket.disable_monitor()
            self._socket.close()
        if self._ends is not None:
            self._ends.close()
        self._socket = self._ends = None

    def _ask(self, request: protocol.Request, deadline: float) -> protocol.Reply:
        try:
            reply = self._exchange(request, deadline)
        except BaseException:
            self.close()  # an answer may still come: a new socket will not see it
            raise
        if isinstance(reply, Refused):
            raise PeerRefusedError(reply.why)
        return reply

    def _exchange(self, request: protocol.Request, deadline: float) -> protocol.Reply:
        nonce, body = secrets.token_bytes(NONCE_BYTES), protocol.encode(request)
        try:
            if self._socket is None:
                self._open()
            assert self._socket is not None
            self._socket.send_multipart([nonce, body], zmq.NOBLOCK)
            while True:
                self._wait_for_answer(self._socket, deadline)
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                if len(frames) == 2 and frames[0] == nonce:
                    return protocol.decode_reply(frames[1])
        except zmq.Again:
            raise PeerUnreachableError(f"{self._address}: {_NO_CONNECTION}") from None
        except (zmq.ZMQError, UnicodeError) as error:  # UnicodeError: no host can have that name
            raise PeerUnreachableError(f"{self._address}: {error}") from None

    def _open(self) -> None:
        self._socket = _open_socket(self._context, zmq.DEALER, self._host)
        self._socket.curve_serverkey = zmq.curve_public(_secret_key(self._key))
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._ends = self._socket.get_monitor_socket(_CONNECTION_ENDED)
        self._socket.connect(self._address)

    def _wait_for_answer(self, socket: "zmq.Socket[bytes]", deadline: float) -> None:
        """Raises DeadlineError, PeerUnreachableError."""
        assert self._ends is not None
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._ends, zmq.POLLIN)
        remaining_ms = int((deadline - time.monotonic()) * 1000)
        ready = dict(poller.poll(remaining_ms)) if remaining_ms > 0 else {}
        if socket in ready:
            return
        if self._ends in ready:
            raise PeerUnreachableError(f"{self._address}: {_NO_CONNECTION}")
        raise DeadlineError(f"{self._address} did not answer in time")


class ControlClients:
    """Clients that are kept connected from one use to the next. Safe from any thread.

    Args:
        context: outlives them.
        key: the deployment's.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", key: DeploymentKey) -> None:
        self._context = context
        self._key = key
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[tuple[str, int], list[ControlClient]] = {}

    @contextmanager
    def client(self, host: str, port: int) -> Iterator[ControlClient]:
        """One for this thread's use. It is kept only if that raised nothing."""
        with self._lock:
            idle = self._idle.get((host, port), [])
            client = idle.pop() if idle else None
        if client is not None and not client.is_connected:
            client.close()
            client = None
        client = client or ControlClient(self._context, self._key, host, port)
        try:
            yield client
        except BaseException:
            client.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.setdefault((host, port), []).append(client)
                return
        client.close()

    def forget(self, host: str, port: int) -> None:
        """Close what is kept for this peer."""
        with self._lock:
            idle = self._idle.pop((host, port), [])
        for client in idle:
            client.close()

    def close(self) -> None:
        """Close what is kept. What is in use is closed after its use."""
        with self._lock:
            self._closed = True
            peers = list(self._idle)
        for host, port in peers:
            self.forget(host, port)


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _open_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, host: str) -> "zmq.Socket[bytes]":
    opened = context.socket(kind)
    opened.linger = 0  # from the start: once the context ends, it can no longer be set
    opened.ipv6 = ":" in host
    opened.set_hwm(_MAX_WAITING)
    opened.setsockopt(zmq.HANDSHAKE_IVL, int(_HANDSHAKE_TIMEOUT_S * 1000))
    return opened


def _secret_key(key: DeploymentKey) -> bytes:
    """P's CURVE key, as text. Its public half is known to those alone who hold the deployment key, too."""
    return z85.encode(key.mac("control port"))
