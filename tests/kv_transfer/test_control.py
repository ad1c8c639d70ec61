"""Real sockets; a raw socket, zmq's or the system's, where a peer misbehaves."""

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from kv_transfer import protocol
from kv_transfer.auth import NONCE_BYTES
from kv_transfer.control import ControlClient, ControlClients, ControlServer
from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.protocol import (
    EndLease,
    EndRead,
    Hello,
    ReadEnded,
    ReadSpans,
)
from tests.kv_transfer.control_peers import FINGERPRINT, NONCE, WELCOME, Context, Prefill, false_server, raw_peer
from tests.kv_transfer.rank_peers import KEY, cpu_seconds_of, num_open_files, soon, until


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


def answer_of(raw: zmq.Socket[bytes], nonce: bytes) -> bytes:
    while raw.poll(10_000):
        first, *rest = raw.recv_multipart()
        if first == nonce:
            return rest[0]
    raise AssertionError("the server fell silent")


# --- greeting


def test_a_compatible_peer_is_welcome(client: ControlClient) -> None:
    assert client.greet(FINGERPRINT, soon()) == WELCOME


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol_version", 1), ("vllm_version", "0.33.0"), ("model", "other"), ("kv_cache_dtype", "float32")],
)
def test_what_differs_is_named_with_both_values(
    client: ControlClient, caplog: pytest.LogCaptureFixture, field: str, value: object
) -> None:
    theirs = msgspec.structs.replace(FINGERPRINT, **{field: value})
    ours = getattr(FINGERPRINT, field)
    with pytest.raises(PeerRefusedError, match=f"{field} is {ours!r} here and {value!r} there"):
        client.greet(theirs, soon())
    assert "refused a peer" in caplog.text
    assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_over_ipv6(context: Context) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    with contextlib.closing(Prefill(host="::1")) as prefill, ControlClient(context, KEY, "::1", prefill.port) as client:
        assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_a_port_of_ones_own_choice_and_one_that_is_taken(context: Context, prefill: Prefill) -> None:
    files = num_open_files()
    with pytest.raises(zmq.ZMQError, match="in use"):
        ControlServer("127.0.0.1", prefill.port, KEY, WELCOME, FINGERPRINT, prefill.leases)
    assert num_open_files() <= files
    port = prefill.port
    prefill.close()
    again = ControlServer("127.0.0.1", port, KEY, WELCOME, FINGERPRINT, prefill.leases)
    assert again.port == port
    again.close()


# --- leases


def test_ending_a_read_ends_the_lease(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1, 2], num_readers=1)
    assert client.end_read(EndRead(lease.lease_id, "reader", 1, 2), soon())
    assert client.end_read(EndRead(lease.lease_id, "reader", 0, 2), soon())
    assert [ended.block_ids for ended in prefill.leases.take_ended()] == [(1, 2)]
    assert not client.end_read(EndRead(lease.lease_id, "reader", 0, 2), soon())
    assert not client.end_read(EndRead("no such lease", "reader"), soon())


def test_a_proxy_ends_a_lease_that_no_engine_will_read(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1, 2], num_readers=3)
    assert client.end_lease(lease.lease_id, soon())
    assert [ended.block_ids for ended in prefill.leases.take_ended()] == [(1, 2)]
    assert not client.end_lease(lease.lease_id, soon())
    assert not client.end_lease("no such lease", soon())
    assert not client.end_read(EndRead(lease.lease_id, "reader"), soon())


def test_extending_leases(prefill: Prefill, client: ControlClient) -> None:
    leases = [prefill.leases.grant([block], num_readers=1).lease_id for block in range(1000)]
    prefill.clock.skipped_s = 29
    assert client.extend_leases([*leases[:900], "no such lease"], soon()) == tuple(leases[:900])
    prefill.clock.skipped_s = 58
    until(lambda: prefill.leases.end_read(leases[-1], "reader", None, 1) is False, "it did not expire")
    assert client.extend_leases(leases, soon()) == tuple(leases[:900])


def test_a_lease_expires_without_any_message() -> None:
    with contextlib.closing(Prefill(lease_s=0.05)) as prefill:
        prefill.leases.grant([1], num_readers=1)
        until(lambda: prefill.leases.has_ended, "the lease did not expire")
        prefill.leases.open_early("ticket", 1)
        prefill.leases.grant([2], num_readers=1)
        until(lambda: len(prefill.leases) == 1, "the next lease did not expire")
        prefill.leases.fill("ticket", [3])
        until(lambda: len(prefill.leases) == 0, "the early lease did not expire")


def test_a_read_that_ends_after_the_lease_is_void(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1], num_readers=1)
    prefill.clock.skipped_s = 31  # P was stopped for so long
    assert not client.end_read(EndRead(lease.lease_id, "reader"), soon())
    assert prefill.leases.has_ended


def test_leases_longer_than_zmq_can_sleep(context: Context) -> None:
    with contextlib.closing(Prefill(lease_s=1e9)) as prefill:
        lease = prefill.leases.grant([1], num_readers=1)
        with ControlClient(context, KEY, "127.0.0.1", prefill.port) as client:
            assert client.end_read(EndRead(lease.lease_id, "reader"), soon())


# --- peers that hold the key and misbehave


def test_garbage_is_dropped_and_the_thread_lives(prefill: Prefill, client: ControlClient, context: Context) -> None:
    rng = random.Random(13)
    garbage: list[list[bytes]] = [
        [b""],
        [b"", b""],
        [NONCE, b"", b""],
        [b"short", protocol.encode(EndLease("lease"))],
        [NONCE] * 100,
        [NONCE, b"\xc1"],
        [NONCE, b"\x91" * 60_000],
        [NONCE, b"\x84\xa4type\xa8end_read\xa8lease_id\xa2\xff\xfe\xa6reader\xa1a\xa4rank\xc0"],
        [NONCE, protocol.encode(ReadEnded(True))],
        [NONCE, protocol.encode(EndRead("", "", 0))],
    ]
    valid = protocol.encode(EndRead("lease", "reader"))
    for _ in range(300):
        damaged = bytearray(valid)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        garbage.append([NONCE, bytes(damaged)])
    lease = prefill.leases.grant([1], num_readers=1)
    with raw_peer(context, prefill.port) as raw:
        for frames in garbage:
            raw.send_multipart(frames)
        raw.send_multipart([b"l" * NONCE_BYTES, protocol.encode(Hello(FINGERPRINT))])
        answer_of(raw, b"l" * NONCE_BYTES)
    assert prefill.dropped.take() >= 10
    assert len(prefill.leases) == 1
    assert client.end_read(EndRead(lease.lease_id, "reader"), soon())


def test_a_request_of_the_rank_server_is_refused(prefill: Prefill, context: Context) -> None:
    with raw_peer(context, prefill.port) as raw:
        raw.send_multipart([NONCE, protocol.encode(ReadSpans(b"", b""))])
        assert b"does not belong on the control port" in answer_of(raw, NONCE)


def test_messages_longer_than_any_of_ours_are_not_taken(
    prefill: Prefill, client: ControlClient, context: Context
) -> None:
    with raw_peer(context, prefill.port) as raw:
        raw.linger = 0
        raw.send_multipart([NONCE, bytes(1 << 17)])
        assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_a_peer_that_never_reads_its_answers_stops_nobody(
    prefill: Prefill, client: ControlClient, context: Context
) -> None:
    hello = protocol.encode(Hello(FINGERPRINT))
    with raw_peer(context, prefill.port) as raw:
        raw.linger = 0
        raw.rcvhwm = 1
        raw.sndtimeo = 200
        with contextlib.suppress(zmq.Again):
            for _ in range(20_000):
                raw.send_multipart([NONCE, hello])
        assert client.greet(FINGERPRINT, soon()) == WELCOME


# --- servers that misbehave


def test_a_late_answer_is_not_taken_for_the_next_one(context: Context) -> None:
    """The false server answers each question twice; the second answer arrives before the next question's."""
    valid = iter([True, False])

    def answer_twice(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        reply = protocol.encode(ReadEnded(next(valid)))
        for _ in range(2):
            router.send_multipart([*frames[:2], reply])

    with false_server(context, answer_twice) as port, ControlClient(context, KEY, "127.0.0.1", port) as client:
        assert client.end_lease("a", soon()) is True
        assert client.end_lease("b", soon()) is False


def test_an_answer_after_the_deadline_is_not_taken_for_the_next_one(context: Context) -> None:
    questions: list[list[bytes]] = []

    def answer_late(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        questions.append(frames)
        if len(questions) == 2:
            for valid, (identity, nonce, _) in zip([True, False], questions, strict=True):
                router.send_multipart([identity, nonce, protocol.encode(ReadEnded(valid))])

    with false_server(context, answer_late) as port, ControlClient(context, KEY, "127.0.0.1", port) as client:
        with pytest.raises(DeadlineError):
            client.end_lease("a", time.monotonic() + 0.5)
        assert client.end_lease("b", soon()) is False


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ([b"\xc1"], ProtocolError),
        ([b"\x82\xa4type\xa7refused\xa3why\xa2\xff\xfe"], ProtocolError),
        ([protocol.encode(WELCOME)], ProtocolError),
        ([protocol.encode(protocol.Refused("no"))], PeerRefusedError),
        ([protocol.encode(ReadEnded(True)), b"one frame too many"], DeadlineError),
        ([], DeadlineError),
    ],
)
def test_what_is_no_answer_fails(context: Context, reply: list[bytes], error: type[Exception]) -> None:
    def answer(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        router.send_multipart([*frames[:2], *reply])

    with false_server(context, answer) as port, ControlClient(context, KEY, "127.0.0.1", port) as client:
        deadline = time.monotonic() + (0.5 if error is DeadlineError else 20)
        for ask in (
            lambda: client.end_lease("lease", deadline),
            lambda: client.end_read(EndRead("lease", "reader"), deadline),
            lambda: client.extend_leases(["lease"], deadline),
        ):
            with pytest.raises(error):
                ask()


def test_a_flood_of_wrong_answers_meets_the_deadline(context: Context) -> None:
    def flood(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with contextlib.suppress(zmq.Again):
                router.send_multipart([frames[0], NONCE, b"x"], zmq.NOBLOCK)

    with false_server(context, flood) as port, ControlClient(context, KEY, "127.0.0.1", port) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            client.greet(FINGERPRINT, began + 0.2)
        assert time.monotonic() - began < 5


def test_a_server_that_is_gone_is_noticed_at_once(context: Context) -> None:
    prefill = Prefill()
    with ControlClient(context, KEY, "127.0.0.1", prefill.port) as client:
        assert client.greet(FINGERPRINT, soon()) == WELCOME
        prefill.close()
        began = time.monotonic()
        with pytest.raises(PeerUnreachableError, match=str(prefill.port)):
            client.end_lease("lease", began + 60)
        assert time.monotonic() - began < 30


def test_a_server_that_goes_while_it_is_asked_is_noticed_at_once(context: Context) -> None:
    with false_server(context, lambda router, frames: router.unbind(router.last_endpoint)) as port:
        began = time.monotonic()
        with (
            pytest.raises(PeerUnreachableError, match=str(port)),
            ControlClient(context, KEY, "127.0.0.1", port) as client,
        ):
            client.end_lease("lease", began + 60)
        assert time.monotonic() - began < 30


class TestControlClients:
    def test_a_connection_is_used_again(self, context: Context) -> None:
        prefill = Prefill()
        clients = ControlClients(context, KEY)
        with clients.client("127.0.0.1", prefill.port) as first:
            assert first.greet(FINGERPRINT, soon()) == WELCOME
        with clients.client("127.0.0.1", prefill.port) as again, clients.client("127.0.0.1", prefill.port) as other:
            assert again is first
            assert other is not first, "one thread at a time uses a client"
        clients.close()
        prefill.close()

    def test_one_that_failed_is_not_kept(self, context: Context) -> None:
        prefill = Prefill()
        clients = ControlClients(context, KEY)
        with pytest.raises(DeadlineError), clients.client("127.0.0.1", prefill.port) as failed:
            failed.greet(FINGERPRINT, time.monotonic() - 1)
        with clients.client("127.0.0.1", prefill.port) as client:
            assert client is not failed
        clients.close()
        prefill.close()

    def test_one_whose_peer_has_gone_is_not_used_again(self, context: Context) -> None:
        prefill = Prefill()
        clients = ControlClients(context, KEY)
        with clients.client("127.0.0.1", prefill.port) as client:
            assert client.greet(FINGERPRINT, soon()) == WELCOME
        prefill.close()
        deadline = soon()
        while client.is_connected:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with clients.client("127.0.0.1", prefill.port) as another:
            assert another is not client
        clients.close()

    def test_forget_and_close(self, context: Context) -> None:
        prefill = Prefill()
        clients = ControlClients(context, KEY)
        with clients.client("127.0.0.1", prefill.port) as client:
            assert client.greet(FINGERPRINT, soon()) == WELCOME
        assert client.is_connected
        clients.forget("127.0.0.1", prefill.port)
        assert not client.is_connected
        with clients.client("127.0.0.1", prefill.port) as late:
            assert late.greet(FINGERPRINT, soon()) == WELCOME
            clients.close()
        assert not late.is_connected
        prefill.close()


def test_a_deadline_that_is_over(client: ControlClient) -> None:
    with pytest.raises(DeadlineError):
        client.greet(FINGERPRINT, time.monotonic() - 1)
    assert client.greet(FINGERPRINT, soon()) == WELCOME


@pytest.mark.parametrize("host", ["", "not a host", "\ud800", "a\x00b", "x" * 512, "*"])
def test_a_host_that_cannot_be_is_a_transfer_error(context: Context, host: str) -> None:
    with ControlClient(context, KEY, host, 9000) as client, pytest.raises((PeerUnreachableError, DeadlineError)):
        client.greet(FINGERPRINT, time.monotonic() + 0.1)


def test_ending_the_context_ends_a_wait() -> None:
    context: Context = zmq.Context()
    errors: list[BaseException] = []
    asked = threading.Event()

    def wait() -> None:
        with false_server(other, lambda router, frames: asked.set()) as port:
            try:
                with ControlClient(context, KEY, "127.0.0.1", port) as client:
                    client.greet(FINGERPRINT, soon())
            except PeerUnreachableError as error:
                errors.append(error)

    with zmq.Context() as other:
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        assert asked.wait(10)
        ending = threading.Thread(target=context.term, daemon=True)
        ending.start()
        ending.join(timeout=10)
        assert not ending.is_alive()
        waiting.join(timeout=10)
    assert len(errors) == 1


# --- the server's own life


def test_closing_ends_the_thread_and_every_descriptor() -> None:
    files = num_open_files()
    threads = {thread.ident for thread in threading.enumerate()}
    prefill = Prefill()
    with zmq.Context() as context, ControlClient(context, KEY, "127.0.0.1", prefill.port) as client:
        client.greet(FINGERPRINT, soon())
    prefill.close()
    prefill.close()  # twice is once
    assert {thread.ident for thread in threading.enumerate()} == threads
    assert num_open_files() <= files


def test_a_wake_up_after_closing_touches_no_other_file() -> None:
    prefill = Prefill()
    assert prefill.server is not None
    wake_fd = prefill.server._wake_fd
    prefill.close()
    reader, writer = os.pipe()
    if writer != wake_fd:
        os.dup2(writer, wake_fd)  # the number is somebody else's now
    os.set_blocking(reader, False)
    prefill.leases.grant([1], num_readers=1)
    prefill.server.wake()
    with pytest.raises(BlockingIOError):
        os.read(reader, 8)
    for fd in {reader, writer, wake_fd}:
        os.close(fd)


def test_an_idle_server_uses_no_cpu_while_leases_are_open(prefill: Prefill, client: ControlClient) -> None:
    for block_id in range(100):
        prefill.leases.grant([block_id], num_readers=1)
    client.greet(FINGERPRINT, soon())
    with cpu_seconds_of(prefill.thread) as used_s:
        time.sleep(1)
        assert used_s() < 0.02
