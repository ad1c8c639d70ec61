"""Raw ends of connections to rank servers, for tests in which one side misbehaves."""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from kv_transfer import protocol
from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from kv_transfer.errors import ProtocolError
from kv_transfer.protocol import Challenge, Connect, FollowPrefill, Proof, RankEndpoint, ReadSpans, SpansFollow
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient, RankServer

KEY = DeploymentKey(b"k" * 32)
OTHER_KEY = DeploymentKey(b"o" * 32)
HEADER = struct.Struct("<I")

Answer = Callable[[socket.socket], None]


def soon() -> float:
    return time.monotonic() + 20


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def num_open_files() -> int:
    """May fall at any time: what earlier tests have left to the garbage collector counts too."""
    return len(os.listdir("/proc/self/fd"))


def kv_threads() -> set[str]:
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate() if thread.name.startswith("kv-")}


def frame(message: protocol.Request | protocol.Reply) -> bytes:
    data = protocol.encode(message)
    return HEADER.pack(len(data)) + data


def receive_frame(connection: socket.socket) -> bytes:
    """Empty when the peer has closed."""
    header = connection.recv(HEADER.size, socket.MSG_WAITALL)
    return connection.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL) if header else b""


def dial(endpoint: RankEndpoint) -> socket.socket:
    return socket.create_connection((endpoint.host, endpoint.port), timeout=10)


def challenge_of(connection: socket.socket, nonce: bytes) -> Challenge:
    """Begin a handshake as D."""
    connection.sendall(frame(Connect(nonce)))
    challenge = protocol.decode_reply(receive_frame(connection))
    assert isinstance(challenge, Challenge)
    return challenge


def prove(connection: socket.socket, run_id: str, key: DeploymentKey = KEY) -> None:
    """The handshake as D."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    challenge = challenge_of(connection, nonce)
    proof = key.mac("rank-client", nonce, challenge.nonce, run_id.encode())
    connection.sendall(frame(Proof(proof, run_id)))


def let_in(connection: socket.socket, key: DeploymentKey = KEY) -> None:
    """The handshake as P, which takes whoever comes."""
    hello = protocol.decode_request(receive_frame(connection))
    assert isinstance(hello, Connect)
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(frame(Challenge(nonce, key.mac("rank-server", hello.nonce, nonce))))
    assert isinstance(protocol.decode_request(receive_frame(connection)), Proof)


def is_closed_by_peer(connection: socket.socket) -> bool:
    """Waits for it."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def says_nothing(connection: socket.socket) -> None:
    is_closed_by_peer(connection)


def answers(data: bytes) -> Answer:
    """Let D in, take its request, and send this."""

    def answer(connection: socket.socket) -> None:
        let_in(connection)
        receive_frame(connection)
        connection.sendall(data)

    return answer


@contextlib.contextmanager
def stand_in(*each: Answer) -> Iterator[RankEndpoint]:
    """A stand-in for P that treats each connection, one after the other, in the next of these ways, then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in each:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(10)
                    answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield RankEndpoint("127.0.0.1", listener.getsockname()[1], "run")
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=15)
        assert not thread.is_alive()


@contextlib.contextmanager
def cpu_seconds_of(*threads: threading.Thread) -> Iterator[Callable[[], float]]:
    """What these threads have used since, seconds of CPU."""
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident is not None]
    assert len(clocks) == len(threads)
    before_s = sum(map(time.clock_gettime, clocks))
    yield lambda: sum(map(time.clock_gettime, clocks)) - before_s


# --- a P that serves


def echo(connection: RankConnection, request: ReadSpans) -> None:
    connection.send(SpansFollow(len(request.offsets)), soon(), [memoryview(request.offsets)])


def break_down(connection: RankConnection, request: FollowPrefill) -> None:
    raise RuntimeError("no more progress")


class Prefill:
    def __init__(self, host: str = "127.0.0.1", key: DeploymentKey = KEY) -> None:
        self.server = RankServer(host, key)
        self.server.handle(ReadSpans, echo)
        self.server.handle(FollowPrefill, break_down)
        self.server.start()
        self.endpoint = self.server.endpoint

    @property
    def num_served(self) -> int:
        return len(self.server._serving)


def ask(client: RankClient, peer: RankEndpoint, data: bytes = b"data", deadline: float | None = None) -> bytes:
    deadline = soon() if deadline is None else deadline
    with client.connection(peer, deadline) as connection:
        connection.send(ReadSpans(data, b""), deadline)
        reply = connection.receive_reply(deadline)
        if not isinstance(reply, SpansFollow):
            raise ProtocolError(str(reply))
        received = bytearray(reply.num_bytes)
        connection.receive_into([memoryview(received)], deadline)
        return bytes(received)


def ask_anew(peer: RankEndpoint) -> bytes:
    """Over a connection of its own."""
    with contextlib.closing(RankClient(KEY)) as client:
        return ask(client, peer)
