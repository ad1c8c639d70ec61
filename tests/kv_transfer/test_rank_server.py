"""Real sockets on both sides; where one side misbehaves, it is a raw socket."""

import contextlib
import logging
import os
import random
import resource
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_transfer import protocol, rank_connection, rank_server
from kv_transfer.auth import NONCE_BYTES
from kv_transfer.errors import (
    AuthError,
    PeerRefusedError,
    PeerUnreachableError,
)
from kv_transfer.protocol import (
    MAX_FRAME_BYTES,
    Connect,
    EndRead,
    FollowPrefill,
    Proof,
    RankEndpoint,
    ReadSpans,
    SpansFollow,
)
from kv_transfer.rank_server import RankClient, RankServer
from tests.kv_transfer.rank_peers import (
    HEADER,
    KEY,
    OTHER_KEY,
    Prefill,
    ask,
    ask_anew,
    challenge_of,
    cpu_seconds_of,
    dial,
    frame,
    is_closed_by_peer,
    kv_threads,
    let_in,
    num_open_files,
    prove,
    receive_frame,
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


# --- exchanges


@pytest.mark.parametrize("size", [0, 1, 100_000, MAX_FRAME_BYTES - 1024])
def test_a_request_and_its_answer(prefill: Prefill, client: RankClient, size: int) -> None:
    data = secrets.token_bytes(size)
    assert ask(client, prefill.endpoint, data) == data


def test_many_buffers_and_partial_calls(prefill: Prefill, client: RankClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """More buffers than one call takes, which come a few bytes at a time."""
    monkeypatch.setattr(rank_connection, "_BUFFERS_PER_CALL", 7)
    monkeypatch.setattr(rank_connection, "_BYTES_PER_CALL", 100)
    sent = [secrets.token_bytes(size % 50) for size in range(300)]
    received = [bytearray(len(data)) for data in sent]

    def trickle(connection: socket.socket) -> None:
        let_in(connection)
        receive_frame(connection)
        data = frame(SpansFollow(0)) + b"".join(sent)
        for start in range(0, len(data), 13):
            connection.sendall(data[start : start + 13])

    with stand_in(trickle) as peer, client.connection(peer, soon()) as connection:
        connection.send(ReadSpans(b"", b""), soon())
        assert connection.receive_reply(soon()) == SpansFollow(0)
        connection.receive_into([memoryview(buffer) for buffer in received], soon())
    assert received == sent


def test_many_threads_at_once(prefill: Prefill, client: RankClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        data = [secrets.token_bytes(1000) for _ in range(100)]
        assert list(pool.map(lambda each: ask(client, prefill.endpoint, each), data)) == data
    assert prefill.num_served <= 8


def test_over_ipv6(client: RankClient) -> None:
    try:
        prefill = Prefill("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    assert ask(client, prefill.endpoint) == b"data"
    prefill.server.close()


def test_a_handler_that_fails_ends_its_connection_alone(
    prefill: Prefill, client: RankClient, caplog: pytest.LogCaptureFixture
) -> None:
    def follow() -> None:
        with client.connection(prefill.endpoint, soon()) as connection:
            connection.send(FollowPrefill("t", "d"), soon())
            connection.receive_reply(soon())

    with pytest.raises(PeerUnreachableError):
        follow()
    assert "no more progress" in caplog.text
    assert ask(client, prefill.endpoint) == b"data"
    assert prefill.server.dropped.take() == 0


# --- the handshake: what a peer without the key can do


def test_a_server_with_another_key_is_found_out(client: RankClient) -> None:
    prefill = Prefill(key=OTHER_KEY)
    with pytest.raises(AuthError, match="does not hold this deployment's key"):
        ask(client, prefill.endpoint)
    assert not client._in_use
    prefill.server.close()


def test_a_client_with_another_key_is_refused_and_counted(prefill: Prefill, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            with dial(prefill.endpoint) as connection:
                prove(connection, prefill.endpoint.run_id, OTHER_KEY)
                assert b"the deployment keys differ" in receive_frame(connection)
                assert is_closed_by_peer(connection)
    until(lambda: prefill.num_served == 0, "a stranger was kept")
    assert prefill.server.dropped.take() == 40
    assert len(caplog.records) == 6  # 1, 2, 4, 8, 16, 32


def test_an_earlier_run_of_the_engine_is_refused(prefill: Prefill, client: RankClient) -> None:
    earlier = RankEndpoint(prefill.endpoint.host, prefill.endpoint.port, "earlier")
    with pytest.raises(PeerRefusedError, match="restarted"):
        ask(client, earlier)
    assert prefill.server.dropped.take() == 0  # it holds the key
    assert ask(client, prefill.endpoint) == b"data"


def test_a_proof_for_one_run_is_not_one_for_another(prefill: Prefill) -> None:
    with dial(prefill.endpoint) as connection:
        challenge = challenge_of(connection, NONCE)
        proof = KEY.mac("rank-client", NONCE, challenge.nonce, b"earlier")
        connection.sendall(frame(Proof(proof, prefill.endpoint.run_id)))
        assert b"the deployment keys differ" in receive_frame(connection)


def test_a_recorded_handshake_does_not_work_again(prefill: Prefill) -> None:
    with dial(prefill.endpoint) as connection:
        challenge = challenge_of(connection, NONCE)
        proof = KEY.mac("rank-client", NONCE, challenge.nonce, prefill.endpoint.run_id.encode())
        recorded = frame(Connect(NONCE)) + frame(Proof(proof, prefill.endpoint.run_id))
        connection.sendall(frame(Proof(proof, prefill.endpoint.run_id)) + frame(ReadSpans(b"data", b"")))
        assert protocol.decode_reply(receive_frame(connection)) == SpansFollow(4)
    with dial(prefill.endpoint) as connection:
        connection.sendall(recorded + frame(ReadSpans(b"data", b"")))
        receive_frame(connection)  # another challenge
        assert b"the deployment keys differ" in receive_frame(connection)
    until(lambda: prefill.num_served == 0, "a stranger was kept")
    assert prefill.server.dropped.take() == 1


def test_a_challenge_is_no_proof(prefill: Prefill) -> None:
    """What the server proves cannot be given back to it, nor a recorded challenge to a client."""
    with dial(prefill.endpoint) as connection:
        challenge = challenge_of(connection, NONCE)
        connection.sendall(frame(Proof(challenge.proof, prefill.endpoint.run_id)))
        assert b"the deployment keys differ" in receive_frame(connection)

    def repeat(connection: socket.socket) -> None:
        receive_frame(connection)
        connection.sendall(frame(challenge))

    client = RankClient(KEY)
    with stand_in(repeat) as peer, pytest.raises(AuthError):
        ask(client, peer)
    client.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        HEADER.pack(0),
        HEADER.pack((1 << 32) - 1),
        HEADER.pack(5) + b"\x91" * 5,
        frame(Proof(b"p" * 32, "run")),
        frame(ReadSpans(b"data", b"")),
        frame(EndRead("lease", "reader")),
        frame(SpansFollow(4)),
        frame(Connect(NONCE)) + frame(Connect(NONCE)),
        frame(Connect(b"short")),
        random.Random(1).randbytes(1000),
    ],
)
def test_garbage_before_the_handshake_is_dropped_and_counted(prefill: Prefill, client: RankClient, data: bytes) -> None:
    with dial(prefill.endpoint) as connection:
        connection.sendall(data)
        assert is_closed_by_peer(connection)
    until(lambda: prefill.num_served == 0, "a stranger was kept")
    assert prefill.server.dropped.take() == 1
    assert ask(client, prefill.endpoint) == b"data"


@pytest.mark.parametrize("size", [1025, MAX_FRAME_BYTES])
def test_of_strangers_only_little_is_taken(prefill: Prefill, caplog: pytest.LogCaptureFixture, size: int) -> None:
    """Neither in the first message nor in the second; the connection ends before anything is set aside for it."""
    for start in (b"", frame(Connect(NONCE))):
        with dial(prefill.endpoint) as connection:
            connection.sendall(start + HEADER.pack(size))
            assert is_closed_by_peer(connection)
    until(lambda: prefill.num_served == 0, "a stranger was kept")
    assert caplog.text.count(f"a message of {size} bytes; at most 1024 are taken") == 2


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(MAX_FRAME_BYTES + 1),
        HEADER.pack(3) + b"\xc1\xc1\xc1",
        frame(Connect(NONCE)),
        frame(EndRead("l", "r")),
    ],
)
def test_garbage_after_the_handshake_is_dropped_and_counted(prefill: Prefill, data: bytes) -> None:
    with dial(prefill.endpoint) as connection:
        prove(connection, prefill.endpoint.run_id)
        connection.sendall(data)
        assert is_closed_by_peer(connection)
    until(lambda: prefill.num_served == 0, "the connection was kept")
    assert prefill.server.dropped.take() == 1


def test_a_flood_of_strangers_keeps_nobody_out(
    prefill: Prefill, client: RankClient, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), dial(prefill.endpoint) as connection:
                connection.sendall(os.urandom(600))

    with ThreadPoolExecutor(4) as pool, caplog.at_level(logging.WARNING):
        floods = [pool.submit(flood) for _ in range(4)]
        try:
            for _ in range(20):
                assert ask_anew(prefill.endpoint) == b"data"
                until(lambda: prefill.server.dropped._total > 0, "nothing was counted")
        finally:
            stop.set()
        for each in floods:
            each.result(timeout=10)
    assert len(caplog.records) < 25
    assert ask(client, prefill.endpoint) == b"data"


def test_silent_strangers_keep_nobody_out(
    prefill: Prefill, client: RankClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest of too many that have not proven the key is let go, and none that has."""
    monkeypatch.setattr(rank_server, "_MAX_STRANGERS", 4)
    assert ask(client, prefill.endpoint) == b"data"
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(dial(prefill.endpoint)) for _ in range(4)]
        until(lambda: prefill.num_served == 5, "the strangers were not taken")
        assert ask_anew(prefill.endpoint) == b"data"
        assert is_closed_by_peer(silent[0])
        for connection in silent[1:]:
            challenge_of(connection, NONCE)
    assert ask(client, prefill.endpoint) == b"data"
    assert [len(idle) for idle in client._idle.values()] == [1]


@pytest.mark.parametrize(
    "start", [b"", b"\x05", HEADER.pack(100) + b"x", frame(Connect(NONCE)), frame(Connect(NONCE)) + b"\x05"]
)
def test_a_stranger_that_stops_in_the_middle_is_dropped(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(rank_server, "_HANDSHAKE_TIMEOUT_S", 0.2)
    with dial(prefill.endpoint) as connection:
        connection.sendall(start)
        assert is_closed_by_peer(connection)
    until(lambda: prefill.num_served == 0, "the stranger was kept")
    assert prefill.server.dropped.take() == 1


def test_a_request_that_never_ends_is_dropped(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_server, "_PEER_TIMEOUT_S", 0.2)
    with dial(prefill.endpoint) as connection:
        prove(connection, prefill.endpoint.run_id)
        connection.sendall(HEADER.pack(1 << 20) + b"x")
        assert is_closed_by_peer(connection)
    until(lambda: prefill.server.dropped.take() == 1, "it was not counted")


# --- limits of the system


def test_connections_beyond_the_limit_are_closed(
    prefill: Prefill, client: RankClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_server, "_MAX_CONNECTIONS", 2)
    with contextlib.ExitStack() as held:
        for _ in range(2):
            prove(held.enter_context(dial(prefill.endpoint)), prefill.endpoint.run_id)
        with dial(prefill.endpoint) as refused:
            assert is_closed_by_peer(refused)
    until(lambda: prefill.num_served == 0, "the places were not given back")
    assert ask(client, prefill.endpoint) == b"data"


def test_accepting_pauses_without_file_descriptors_and_recovers(prefill: Prefill, client: RankClient) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as first, socket.socket() as waiting:
        for connection in (first, waiting):
            connection.settimeout(10)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # every number below is in use
        try:
            first.connect((prefill.endpoint.host, prefill.endpoint.port))  # a thread in accept() has its number already
            waiting.connect((prefill.endpoint.host, prefill.endpoint.port))  # into the backlog
            waiting.sendall(frame(Connect(NONCE)))
            waiting.settimeout(0.3)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        waiting.settimeout(10)
        assert b"challenge" in receive_frame(waiting)
    assert ask(client, prefill.endpoint) == b"data"


def test_a_lack_of_threads_costs_one_connection(
    prefill: Prefill, client: RankClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, lacks = threading.Thread.start, ["a thread"]

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name == "kv-rank" and lacks:
            lacks.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    with pytest.raises(PeerUnreachableError):
        ask(client, prefill.endpoint)
    assert ask(client, prefill.endpoint) == b"data"
    assert prefill.num_served == 1


# --- the end


def test_closing_ends_every_thread_and_closes_every_socket() -> None:
    files, threads = num_open_files(), kv_threads()
    prefill, client = Prefill(), RankClient(KEY)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ask(client, prefill.endpoint), range(32)))
    with dial(prefill.endpoint):
        assert kv_threads() > threads
        prefill.server.close()
        prefill.server.close()  # twice is once
        until(lambda: kv_threads() == threads, "a thread was left")
    client.close()
    client.close()
    assert num_open_files() == files


def test_closing_the_server_ends_answers_under_way(client: RankClient) -> None:
    prefill = Prefill()
    with dial(prefill.endpoint) as reader:
        prove(reader, prefill.endpoint.run_id)
        reader.sendall(frame(ReadSpans(bytes(MAX_FRAME_BYTES - 1024), b"")))  # the answer fills every buffer
        assert reader.recv(1)
        began = time.monotonic()
        prefill.server.close()
        assert time.monotonic() - began < 1.5
    assert not prefill.num_served


def test_a_server_that_never_started_closes() -> None:
    files = num_open_files()
    RankServer("127.0.0.1", KEY).close()
    assert num_open_files() == files


def test_an_idle_server_uses_no_cpu(prefill: Prefill, client: RankClient) -> None:
    ask(client, prefill.endpoint)
    threads = [prefill.server._accepting, *prefill.server._serving.values()]
    assert len(threads) == 2
    with cpu_seconds_of(*threads) as used_s:
        time.sleep(0.5)
        assert used_s() < 0.01
