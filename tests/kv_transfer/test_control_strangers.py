"""Who does not hold the deployment key can do nothing on the control port: neither harm it, nor fill it."""

import contextlib
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from kv_transfer import control, protocol
from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlClient
from kv_transfer.errors import PeerUnreachableError
from kv_transfer.protocol import (
    EndLease,
    EndRead,
    ExtendLease,
    Hello,
)
from tests.kv_transfer.control_peers import FINGERPRINT, NONCE, WELCOME, Context, Prefill, false_server, raw_peer
from tests.kv_transfer.rank_peers import KEY, OTHER_KEY, soon, until


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    with contextlib.closing(Prefill()) as prefill:
        yield prefill


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def client(prefill: Prefill, context: Context) -> Iterator[ControlClient]:
    with ControlClient(context, KEY, "127.0.0.1", prefill.port) as client:
        yield client


@pytest.mark.parametrize("key", [None, OTHER_KEY], ids=["no key", "another key"])
def test_who_does_not_hold_the_key_can_do_nothing_and_is_counted(
    prefill: Prefill, context: Context, key: DeploymentKey | None
) -> None:
    lease = prefill.leases.grant([1], num_readers=1)
    deadline = lease.deadline
    for request in (
        EndRead(lease.lease_id, "reader"),
        EndLease(lease.lease_id),
        ExtendLease((lease.lease_id,)),
        Hello(FINGERPRINT),
    ):
        with raw_peer(context, prefill.port, key) as raw:
            raw.send_multipart([NONCE, protocol.encode(request)])
            until(lambda: prefill.dropped.take() > 0, "the stranger was not counted")
            assert not raw.poll(0)
    assert len(prefill.leases) == 1
    assert lease.deadline == deadline
    assert not lease.ended_reads


def test_a_client_with_another_key_gets_no_answer(prefill: Prefill, context: Context) -> None:
    lease = prefill.leases.grant([1], num_readers=1)
    with (
        ControlClient(context, OTHER_KEY, "127.0.0.1", prefill.port) as client,
        pytest.raises(PeerUnreachableError, match="another deployment key"),
    ):
        client.end_lease(lease.lease_id, time.monotonic() + 30)
    assert len(prefill.leases) == 1


def test_a_server_with_another_key_gets_no_question(context: Context) -> None:
    questions: list[list[bytes]] = []
    with (
        false_server(context, lambda router, frames: questions.append(frames), OTHER_KEY) as port,
        ControlClient(context, KEY, "127.0.0.1", port) as client,
        pytest.raises(PeerUnreachableError),
    ):
        client.end_lease("lease", time.monotonic() + 30)
    assert not questions


def test_a_recorded_question_does_no_harm_when_it_is_repeated(prefill: Prefill, context: Context) -> None:
    """A relay records the bytes of a whole exchange, and sends them again."""
    lease, other = prefill.leases.grant([1], num_readers=2), prefill.leases.grant([2], num_readers=1)
    recorded: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            near, _ = listener.accept()
            with near, socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as far:

                def back() -> None:
                    with contextlib.suppress(OSError):
                        while data := far.recv(1 << 16):
                            near.sendall(data)

                backwards = threading.Thread(target=back)
                backwards.start()
                while data := near.recv(1 << 16):
                    recorded.append(data)
                    far.sendall(data)
                far.shutdown(socket.SHUT_RDWR)
                backwards.join(timeout=10)

        relaying = threading.Thread(target=relay)
        relaying.start()
        with ControlClient(context, KEY, "127.0.0.1", listener.getsockname()[1]) as client:
            assert client.end_read(EndRead(lease.lease_id, "reader"), soon())
            assert client.end_lease(other.lease_id, soon())
        relaying.join(timeout=10)
    again = prefill.leases.grant([2], num_readers=1)
    with socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as replay:
        with contextlib.suppress(OSError):
            for data in recorded:
                replay.sendall(data)
                time.sleep(0.01)  # as it came: what is sent before its turn would be dropped for that alone
        until(lambda: prefill.dropped.take() > 0, "the repetition was not counted")
    assert lease.num_done == 1
    assert not again.ended_reads
    assert len(prefill.leases) == 2


def zmtp_without_security() -> bytes:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    return greeting + bytes([4, len(ready)]) + ready


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096),
        b"\xff" + b"\x00" * 8 + b"\x7f" + b"\xff" * 4096,
        zmtp_without_security() + b"\x01\x01x" * 1000,
    ],
    ids=["http", "random", "zmtp greeting", "zmtp frames"],
)
def test_what_does_not_speak_our_language_is_dropped(prefill: Prefill, client: ControlClient, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as raw, contextlib.suppress(OSError):
        raw.sendall(data)
        while raw.recv(1 << 16):
            pass
    assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_a_message_without_end_fills_no_memory(prefill: Prefill) -> None:
    """zmq keeps the frames of a message until the last has come; a stranger must not get so far."""
    more = b"\x03" + struct.pack(">Q", 60_000) + bytes(60_000)
    with socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as raw:
        raw.sendall(zmtp_without_security())
        with pytest.raises(ConnectionError):
            raw.sendall(more * 1000)
    until(lambda: prefill.dropped.take() > 0, "the stranger was not counted")


def test_a_stranger_that_stops_in_the_middle_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_HANDSHAKE_TIMEOUT_S", 0.2)
    with (
        contextlib.closing(Prefill()) as prefill,
        socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as raw,
    ):
        raw.sendall(b"\xff")
        while raw.recv(100):
            pass
        until(lambda: prefill.dropped.take() > 0, "the stranger was not counted")


def test_a_lack_of_file_descriptors_ends_nobody_and_passes(
    prefill: Prefill, client: ControlClient, context: Context
) -> None:
    assert client.greet(FINGERPRINT, soon()) == WELCOME
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.socket()) for _ in range(3)]
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # every number below is in use
        try:
            for stranger in strangers:
                stranger.connect(("127.0.0.1", prefill.port))
            assert client.greet(FINGERPRINT, soon()) == WELCOME
            prefill.leases.grant([1], num_readers=1)
            prefill.clock.skipped_s = 31
            assert client.extend_leases(["lease"], soon()) == ()
            assert len(prefill.leases) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with ControlClient(context, KEY, "127.0.0.1", prefill.port) as another:
        assert another.greet(FINGERPRINT, soon()) == WELCOME


def test_a_flood_delays_neither_answers_nor_expiry(
    prefill: Prefill, client: ControlClient, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()

    def flood_raw() -> None:
        while not stop.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", prefill.port), timeout=10) as raw,
            ):
                raw.sendall(os.urandom(1000))

    def flood_with_key() -> None:
        with raw_peer(context, prefill.port) as raw:
            raw.linger = 0
            raw.sndtimeo = 20
            while not stop.is_set():
                with contextlib.suppress(zmq.Again):
                    raw.send_multipart([b"garbage"])

    floods = [threading.Thread(target=each) for each in (flood_raw, flood_with_key)]
    with caplog.at_level(logging.WARNING):
        for flood in floods:
            flood.start()
        try:
            until(lambda: prefill.dropped._total > 100, "nothing was counted")
            lease = prefill.leases.grant([1], num_readers=1)
            assert client.end_read(EndRead(lease.lease_id, "reader"), soon())
            prefill.leases.grant([2], num_readers=1)
            prefill.clock.skipped_s = 31
            until(lambda: len(prefill.leases) == 0, "the lease did not expire")
            assert client.greet(FINGERPRINT, soon()) == WELCOME
        finally:
            stop.set()
            for flood in floods:
                flood.join(timeout=10)
    assert len(caplog.records) < 30  # not a line for each
