"""Hosts of one DP rank hold on to one another: real sockets, and what a lost process would do is recorded."""

import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from services.node_link import FirstNode, _connect, join_first_node

KEY = DeploymentKey(b"k" * 32)
OTHER_KEY = DeploymentKey(b"o" * 32)
DEADLINE_S = 20.0


@pytest.fixture
def ends() -> "queue.Queue[str]":
    """What either end took for the end of the other."""
    return queue.Queue()


@pytest.fixture
def first(ends: "queue.Queue[str]") -> Iterator[FirstNode]:
    node = FirstNode(("127.0.0.1", 0), KEY, ends.put)
    yield node
    node.close()


def connected(first: FirstNode, number: int = 1) -> socket.socket:
    """A node's end, held here so that a test can let go of it."""
    return _connect(("127.0.0.1", first.port), number, KEY)


def test_the_end_of_a_node_is_the_first_one_s(first: FirstNode, ends: "queue.Queue[str]") -> None:
    stays, goes = connected(first, 1), connected(first, 2)
    goes.close()
    assert ends.get(timeout=DEADLINE_S) == "node 2 has ended"
    stays.close()
    assert ends.get(timeout=DEADLINE_S) == "node 1 has ended"


def test_the_end_of_the_first_node_is_the_others_(ends: "queue.Queue[str]") -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        first = FirstNode(("127.0.0.1", 0), KEY, ends.put)
        try:
            relay = threading.Thread(target=_relay_once, args=(listener, first.port))
            relay.start()
            join_first_node(address, 3, KEY, ends.put, timeout_s=DEADLINE_S)
            relay.join(timeout=DEADLINE_S)
        finally:
            first.close()
    assert {ends.get(timeout=DEADLINE_S), ends.get(timeout=DEADLINE_S)} == {"node 0 has ended", "node 3 has ended"}


def _relay_once(listener: socket.socket, port: int) -> None:
    """Carries a whole greeting between a node and the first one, then drops both."""
    node, _ = listener.accept()
    with node, socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as first:
        node.sendall(first.recv(NONCE_BYTES))
        first.sendall(node.recv(1024))
        node.sendall(first.recv(1024))


def test_strangers_end_nothing(first: FirstNode, ends: "queue.Queue[str]") -> None:
    for say in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10):
        with socket.create_connection(("127.0.0.1", first.port), timeout=DEADLINE_S) as stranger:
            stranger.sendall(say)
            stranger.shutdown(socket.SHUT_WR)
            try:
                while stranger.recv(1024):  # until it is closed on us
                    pass
            except ConnectionResetError:
                pass
    assert ends.empty()
    connected(first).close()  # and it still lets nodes in
    assert ends.get(timeout=DEADLINE_S) == "node 1 has ended"


def test_silent_strangers_do_not_pile_up(first: FirstNode, ends: "queue.Queue[str]") -> None:
    crowd = [socket.create_connection(("127.0.0.1", first.port), timeout=DEADLINE_S) for _ in range(40)]
    greeted = sum(bool(_first_bytes(stranger)) for stranger in crowd)
    assert 1 <= greeted <= 16
    for stranger in crowd:
        stranger.close()
    assert ends.empty()


def _first_bytes(stranger: socket.socket) -> bytes:
    try:
        return stranger.recv(NONCE_BYTES)
    except ConnectionResetError:
        return b""


def test_a_stranger_that_sends_a_byte_now_and_then_is_dropped(
    first: FirstNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.node_link._GREETING_S", 0.3)
    with socket.create_connection(("127.0.0.1", first.port), timeout=DEADLINE_S) as stranger:
        stranger.recv(NONCE_BYTES)
        assert any(not _sends_a_byte(stranger) for _ in range(30))  # fewer than a whole greeting has


def _sends_a_byte(stranger: socket.socket) -> bool:
    time.sleep(0.1)  # within what one byte may take
    try:
        stranger.sendall(b"x")
    except OSError:
        return False
    return True


def test_a_node_with_another_key_is_told_so(
    first: FirstNode, ends: "queue.Queue[str]", caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError, match="needs the same deployment key"):
        join_first_node(("127.0.0.1", first.port), 1, OTHER_KEY, ends.put, timeout_s=0)
    assert ends.empty()


def test_a_first_node_that_is_not_there(ends: "queue.Queue[str]", caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError, match=f"node 0 at 127.0.0.1:{address[1]}: "):
        join_first_node(address, 1, KEY, ends.put, timeout_s=0.7)
    assert len(caplog.records) == 1  # said once, however often it was tried
    assert ends.empty()
