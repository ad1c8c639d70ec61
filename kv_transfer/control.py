"""The control channel: D asks P's scheduler process who it is and tells it when a read has ended."""

import logging
import os
import threading
import time
from types import TracebackType
from typing import Self

import zmq

from kv_transfer import protocol
from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.lease import LeaseTable
from kv_transfer.protocol import EndLease, EndRead, Fingerprint, Hello, ReadEnded, Refused, Welcome

logger = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 3600.0  # zmq counts milliseconds in 32 bits


class ControlServer:
    """P's side, one thread: answers peers and expires leases. It sleeps until a message or an expiry is due.

    Args:
        host: address to listen on; the port is the system's choice.
        welcome: the answer to a compatible peer.
        fingerprint: ours.
        leases: shared with the scheduler's thread.
    """

    def __init__(self, host: str, welcome: Welcome, fingerprint: Fingerprint, leases: LeaseTable) -> None:
        self._welcome = welcome
        self._fingerprint = fingerprint
        self._leases = leases
        self._num_dropped = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in host
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 16)
        self._socket.setsockopt(zmq.SNDTIMEO, 0)  # a peer that reads nothing loses its answer, not our thread
        self.port = self._socket.bind_to_random_port(f"tcp://[{host}]" if ":" in host else f"tcp://{host}")
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
        poller.register(self._wake_fd, zmq.POLLIN)
        while not self._stopping:
            timeout_s = self._leases.seconds_to_expiry()
            ready = dict(poller.poll(None if timeout_s is None else int(min(timeout_s, _LONGEST_SLEEP_S) * 1000) + 1))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._socket in ready:
                self._serve_one()
            self._leases.expire()
        self._socket.close()
        self._context.term()

    def _serve_one(self) -> None:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            if len(frames) != 3:
                raise ProtocolError(f"{len(frames)} frames, not the peer's identity, a sequence number and a request")
            reply = self._answer(protocol.decode_request(frames[2]))
            self._socket.send_multipart([frames[0], frames[1], protocol.encode(reply)])
        except Exception as error:  # whatever a stranger sends, this thread lives on: it also expires the leases
            self._num_dropped += 1
            if self._num_dropped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th...: a flood does not fill the log
                logger.warning("dropped a message on the KV control port, %d so far: %s", self._num_dropped, error)

    def _answer(self, request: protocol.Request) -> protocol.Reply:
        match request:
            case Hello(fingerprint):
                differences = self._fingerprint.differences(fingerprint)
                if not differences:
                    return self._welcome
                why = "prefill and decode do not fit: " + "; ".join(differences) + " (here: prefill; there: decode)"
                logger.error("refused a peer: %s. Start both from one deployment file.", why)
                return Refused(why)
            case EndRead(lease_id, reader, rank):
                return ReadEnded(self._leases.end_read(lease_id, reader, rank))
            case EndLease(lease_id):
                return ReadEnded(self._leases.end(lease_id))
        return Refused(f"{type(request).__name__} does not belong on the control port")


class ControlClient:
    """D's side: one question at a time, each with a deadline. Opened for one load and closed after it, so that nothing
    is kept for a peer that may never come back.

    Args:
        context: outlives the client.
        host, port: P's control server, as the hand-off names it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, port: int) -> None:
        self._context = context
        self._host = host
        self._address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self._sequence = 0
        self._socket: zmq.Socket[bytes] | None = None

    def greet(self, fingerprint: Fingerprint, deadline: float) -> Welcome:
        """Raises PeerRefusedError, DeadlineError, ProtocolError, PeerUnreachableError."""
        reply = self._ask(Hello(fingerprint), deadline)
        if not isinstance(reply, Welcome):
            raise ProtocolError(f"{reply} in answer to a greeting")
        return reply

    def end_read(self, lease_id: str, reader: str, rank: int | None, deadline: float) -> bool:
        """Whether the lease held until now. Raises like `greet`."""
        reply = self._ask(EndRead(lease_id, reader, rank), deadline)
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
            self._socket.close()
            self._socket = None

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
        self._sequence += 1
        sequence = self._sequence.to_bytes(8, "little")
        try:
            if self._socket is None:
                self._socket = self._context.socket(zmq.DEALER)
                self._socket.linger = 0  # from the start: once the context ends, it can no longer be set
                self._socket.ipv6 = ":" in self._host
                self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
                self._socket.connect(self._address)
            self._socket.send_multipart([sequence, protocol.encode(request)], zmq.NOBLOCK)
            while True:
                remaining_ms = int((deadline - time.monotonic()) * 1000)
                if remaining_ms <= 0 or not self._socket.poll(remaining_ms):
                    raise DeadlineError(f"{self._address} did not answer in time")
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                if len(frames) == 2 and frames[0] == sequence:
                    return protocol.decode_reply(frames[1])
        except (zmq.ZMQError, UnicodeError) as error:  # UnicodeError: no host can have that name
            raise PeerUnreachableError(f"{self._address}: {error}") from None
