"""D's side of connections to rank servers; where P misbehaves, it is a raw socket."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_transfer.auth import NONCE_BYTES
from kv_transfer.errors import (
    DeadlineError,
    KVTransferError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.protocol import (
    MAX_FRAME_BYTES,
    Connect,
    RankEndpoint,
    ReadEnded,
    Refused,
    SpansFollow,
)
from kv_transfer.rank_server import RankClient
from tests.kv_transfer.rank_peers import (
    HEADER,
    KEY,
    Answer,
    Prefill,
    answers,
    ask,
    frame,
    let_in,
    num_open_files,
    receive_frame,
    says_nothing,
    soon,
    stand_in,
    until,
)

NONCE = b"n" * NONCE_BYTES


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    prefill = Prefill()
    yield prefill
    prefill.server.close()


@pytest.fixture
def client() -> Iterator[RankClient]:
    client = RankClient(KEY)
    yield client
    client.close()


# --- D: peers that misbehave


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", PeerUnreachableError),
        (b"\x01\x00", PeerUnreachableError),
        (frame(SpansFollow(4)) + b"dat", PeerUnreachableError),
        (HEADER.pack(0), ProtocolError),
        (HEADER.pack(MAX_FRAME_BYTES + 1), ProtocolError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (frame(ReadEnded(True)), ProtocolError),
        (frame(Connect(NONCE)), ProtocolError),
        (frame(Refused("busy")), PeerRefusedError),
    ],
)
def test_what_is_no_answer_ends_the_connection(client: RankClient, data: bytes, error: type[KVTransferError]) -> None:
    with stand_in(answers(data)) as peer, pytest.raises(error):
        ask(client, peer)
    assert not client._in_use
    assert not client._idle


@pytest.mark.parametrize("data", [HEADER.pack(1025), frame(SpansFollow(1)), frame(Refused("no")), b""])
def test_what_is_no_handshake_ends_the_connection(client: RankClient, data: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        receive_frame(connection)
        connection.sendall(data)

    files = num_open_files()
    with stand_in(answer) as peer, pytest.raises((ProtocolError, PeerRefusedError, PeerUnreachableError)):
        ask(client, peer)
    assert num_open_files() <= files


def begins_and_says_nothing(connection: socket.socket) -> None:
    connection.sendall(b"\x05")
    says_nothing(connection)


def lets_in_and_says_nothing(connection: socket.socket) -> None:
    let_in(connection)
    says_nothing(connection)


@pytest.mark.parametrize("stop", [says_nothing, begins_and_says_nothing, lets_in_and_says_nothing])
def test_a_peer_that_stops_answering_meets_the_deadline(client: RankClient, stop: Answer) -> None:
    with stand_in(stop) as peer:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=str(peer.port)):
            ask(client, peer, deadline=began + 0.2)
        assert time.monotonic() - began < 3


def test_a_peer_that_trickles_meets_the_deadline(client: RankClient) -> None:
    """Each byte comes in time; the deadline is that of the whole exchange."""
    stop = threading.Event()

    def trickle(connection: socket.socket) -> None:
        let_in(connection)
        connection.sendall(frame(SpansFollow(1 << 20)))
        while not stop.wait(0.02):
            connection.sendall(b"x")

    with stand_in(trickle) as peer:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            ask(client, peer, deadline=began + 0.3)
        assert time.monotonic() - began < 3
        stop.set()


def test_a_peer_that_takes_nothing_meets_the_deadline(client: RankClient) -> None:
    def take_nothing(connection: socket.socket) -> None:
        let_in(connection)
        done.wait(10)

    done = threading.Event()
    with stand_in(take_nothing) as peer, client.connection(peer, soon()) as connection:
        data = memoryview(bytearray(64 << 20))
        with pytest.raises(DeadlineError):
            connection.send_buffers([data], time.monotonic() + 0.3)
        done.set()


def test_a_deadline_that_is_over_is_not_waited_for(prefill: Prefill, client: RankClient) -> None:
    for _ in range(2):  # with a new connection, with one at hand
        with pytest.raises(DeadlineError):
            ask(client, prefill.endpoint, deadline=time.monotonic() - 1)
        ask(client, prefill.endpoint)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 100, "\ud800", "a\x00b", "127.0.0.1"])
def test_a_peer_that_is_not_there_is_unreachable(client: RankClient, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerUnreachableError):
        ask(client, RankEndpoint(host, port, "run"))


# --- D: connections are kept


def test_connections_are_used_again(prefill: Prefill, client: RankClient) -> None:
    for _ in range(20):
        ask(client, prefill.endpoint)
    assert prefill.num_served == 1
    assert [len(idle) for idle in client._idle.values()] == [1]


def test_a_connection_that_failed_is_not_used_again(client: RankClient) -> None:
    good = answers(frame(SpansFollow(4)) + b"good")
    with stand_in(answers(frame(ReadEnded(True)) + b"rest of the first answer"), good) as peer:
        with pytest.raises(ProtocolError):
            ask(client, peer)
        assert ask(client, peer) == b"good"


@pytest.mark.parametrize("surplus", [b"", b"surplus"])
def test_a_connection_that_is_not_quiet_is_not_used(client: RankClient, surplus: bytes) -> None:
    """The peer has closed it, or sent more than was asked for."""
    with stand_in(*[answers(frame(SpansFollow(4)) + b"good" + surplus)] * 3) as peer:
        for _ in range(3):
            assert ask(client, peer) == b"good"
            (connection,) = client._idle[peer]
            until(lambda c=connection: not c.is_quiet, "nothing came")  # type: ignore[misc]


def test_connections_to_peers_that_left_are_closed(prefill: Prefill, client: RankClient) -> None:
    """A P that restarts is another peer: nobody would ever ask for the old connections again."""
    ask(client, prefill.endpoint)
    prefill.server.close()
    restarted = Prefill()
    ask(client, restarted.endpoint)
    assert list(client._idle) == [restarted.endpoint]
    restarted.server.close()


def test_forgetting_a_peer_closes_its_idle_connections_alone(prefill: Prefill, client: RankClient) -> None:
    other = Prefill()
    ask(client, prefill.endpoint)
    ask(client, other.endpoint)
    client.forget(prefill.endpoint)
    client.forget(RankEndpoint("127.0.0.1", 1, "unknown"))
    until(lambda: prefill.num_served == 0, "the connection was kept")
    assert list(client._idle) == [other.endpoint]
    assert ask(client, prefill.endpoint) == b"data"
    other.server.close()


# --- the end


def test_closing_the_client_ends_exchanges_under_way_and_refuses_new_ones(prefill: Prefill, client: RankClient) -> None:
    with stand_in(lets_in_and_says_nothing) as peer, ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, client, peer)
        until(lambda: bool(client._in_use), "the exchange did not begin")
        client.close()
        with pytest.raises(PeerUnreachableError):
            under_way.result(timeout=5)
    with pytest.raises(PeerUnreachableError, match="shutting down"):
        ask(client, prefill.endpoint)
