"""Real sockets; a raw zmq socket where a peer misbehaves."""

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from kv_transfer import protocol
from kv_transfer.control import ControlClient, ControlServer
from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError, ProtocolError
from kv_transfer.lease import LeaseTable
from kv_transfer.protocol import EndRead, Fingerprint, Hello, RankEndpoint, ReadBlocks, ReadEnded, Welcome

FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16", block_size=16, tp_size=1, layout="l"
)
WELCOME = Welcome((RankEndpoint("127.0.0.1", 9000, "run"),))


def soon() -> float:
    return time.monotonic() + 20


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


class Clock:
    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped_s


class Prefill:
    """P's control plane: leases and the server over them, wired as the scheduler's half wires them."""

    def __init__(self, lease_s: float = 30.0, host: str = "127.0.0.1") -> None:
        self.clock = Clock()
        self.server: ControlServer | None = None
        self.leases = LeaseTable(lease_s=lease_s, tp_size=1, on_change=self._on_change, clock=self.clock)
        self.server = ControlServer(host, WELCOME, FINGERPRINT, self.leases)
        self.port = self.server.port

    def _on_change(self) -> None:
        if self.server is not None:
            self.server.wake()

    def close(self) -> None:
        assert self.server is not None
        self.server.close()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    prefill = Prefill()
    yield prefill
    prefill.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def client(prefill: Prefill, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[ControlClient]:
    with ControlClient(context, "127.0.0.1", prefill.port) as client:
        yield client


@contextlib.contextmanager
def stranger(context: zmq.Context[zmq.Socket[bytes]], port: int) -> Iterator[zmq.Socket[bytes]]:
    with context.socket(zmq.DEALER) as raw:
        raw.linger = 1000
        raw.connect(f"tcp://127.0.0.1:{port}")
        yield raw


@contextlib.contextmanager
def false_server(
    context: zmq.Context[zmq.Socket[bytes]], answer: Callable[[zmq.Socket[bytes], list[bytes]], None]
) -> Iterator[int]:
    """A stand-in for P's control server which answers each request as it likes."""
    with context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                if router.poll(20):
                    answer(router, router.recv_multipart())

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield port
        finally:
            stop.set()
            thread.join()


# --- greeting


def test_a_compatible_peer_is_welcome(client: ControlClient) -> None:
    assert client.greet(FINGERPRINT, soon()) == WELCOME


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 2),
        ("vllm_version", "0.33.0"),
        ("model", "other"),
        ("kv_cache_dtype", "float32"),
        ("block_size", 128),
        ("tp_size", 8),
        ("layout", "other"),
    ],
)
def test_what_differs_is_named_with_both_values(client: ControlClient, field: str, value: object) -> None:
    theirs = msgspec.structs.replace(FINGERPRINT, **{field: value})
    ours = getattr(FINGERPRINT, field)
    with pytest.raises(PeerRefusedError, match=f"{field} is {ours!r} here and {value!r} there"):
        client.greet(theirs, soon())


def test_over_ipv6(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    prefill = Prefill(host="::1")
    with ControlClient(context, "::1", prefill.port) as client:
        assert client.greet(FINGERPRINT, soon()) == WELCOME
    prefill.close()


# --- leases


def test_ending_a_read_ends_the_lease(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1, 2], num_readers=1)
    assert client.end_read(lease.lease_id, "reader", 0, soon())
    assert [ended.block_ids for ended in prefill.leases.take_ended()] == [(1, 2)]
    assert not client.end_read(lease.lease_id, "reader", 0, soon())
    assert not client.end_read("no such lease", "reader", None, soon())


def test_a_proxy_ends_a_lease_that_no_engine_will_read(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1, 2], num_readers=3)
    assert client.end_lease(lease.lease_id, soon())
    assert [ended.block_ids for ended in prefill.leases.take_ended()] == [(1, 2)]
    assert not client.end_lease(lease.lease_id, soon())
    assert not client.end_lease("no such lease", soon())
    assert not client.end_read(lease.lease_id, "reader", 0, soon())


def test_a_lease_expires_without_any_message() -> None:
    prefill = Prefill(lease_s=0.05)
    prefill.leases.grant([1], num_readers=1)
    until(lambda: prefill.leases.has_ended, "the lease did not expire")
    prefill.leases.grant([2], num_readers=1)
    until(lambda: len(prefill.leases) == 0, "the next lease did not expire")
    prefill.close()


def test_a_read_that_ends_after_the_lease_is_void(prefill: Prefill, client: ControlClient) -> None:
    lease = prefill.leases.grant([1], num_readers=1)
    prefill.clock.skipped_s = 31  # P was stopped for so long
    assert not client.end_read(lease.lease_id, "reader", 0, soon())
    assert prefill.leases.has_ended


def test_leases_longer_than_zmq_can_sleep(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    prefill = Prefill(lease_s=1e9)
    lease = prefill.leases.grant([1], num_readers=1)
    with ControlClient(context, "127.0.0.1", prefill.port) as client:
        assert client.end_read(lease.lease_id, "reader", 0, soon())
    prefill.close()


# --- strangers


def test_garbage_is_dropped_and_the_thread_lives(
    prefill: Prefill,
    client: ControlClient,
    context: zmq.Context[zmq.Socket[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(13)
    garbage: list[list[bytes]] = [
        [b""],
        [b"", b""],
        [b"1", b"", b""],
        [b"1"] * 100,
        [b"1", b"\xc1"],
        [b"1", b"\x91" * 60_000],
        [b"1", b"\x84\xa4type\xa8end_read\xa8lease_id\xa2\xff\xfe\xa6reader\xa1a\xa4rank\xc0"],
        [b"1", protocol.encode(ReadEnded(True))],
        [b"1", protocol.encode(EndRead("", "", 1 << 40))],
    ]
    valid = protocol.encode(EndRead("lease", "reader", None))
    for _ in range(500):
        damaged = bytearray(valid)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        garbage.append([b"1", bytes(damaged)])
    lease = prefill.leases.grant([1], num_readers=1)
    with caplog.at_level(logging.WARNING), stranger(context, prefill.port) as raw:
        for frames in garbage:
            raw.send_multipart(frames)
        raw.send_multipart([b"last", protocol.encode(Hello(FINGERPRINT))])
        while raw.poll(5000):
            if raw.recv_multipart()[0] == b"last":
                break
        else:
            pytest.fail("the server fell silent")
    assert client.greet(FINGERPRINT, soon()) == WELCOME
    assert len(prefill.leases) == 1
    assert client.end_read(lease.lease_id, "reader", None, soon())
    assert 1 <= len(caplog.records) <= 12  # not a line for each


def test_a_request_of_the_block_port_is_refused(prefill: Prefill, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with stranger(context, prefill.port) as raw:
        raw.send_multipart([b"7", protocol.encode(ReadBlocks("run", (1,)))])
        assert raw.poll(5000)
        sequence, reply = raw.recv_multipart()
    assert sequence == b"7"
    assert b"does not belong on the control port" in reply


def test_what_does_not_even_speak_zmq_is_dropped(prefill: Prefill, client: ControlClient) -> None:
    for data in [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" + b"\x00" * 8 + b"\x7f" + b"\xff" * 4096]:
        with socket.create_connection(("127.0.0.1", prefill.port), timeout=5) as raw:
            raw.sendall(data)
    assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_messages_longer_than_any_of_ours_are_not_taken(
    prefill: Prefill, client: ControlClient, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with stranger(context, prefill.port) as raw:
        raw.send_multipart([b"1", b"\x00" * (1 << 17)])
        assert client.greet(FINGERPRINT, soon()) == WELCOME


def test_a_peer_that_never_reads_its_answers_stops_nobody(
    prefill: Prefill, client: ControlClient, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    hello = protocol.encode(Hello(FINGERPRINT))
    with context.socket(zmq.DEALER) as raw:
        raw.linger = 0
        raw.rcvhwm = 1
        raw.sndtimeo = 200
        raw.connect(f"tcp://127.0.0.1:{prefill.port}")
        with contextlib.suppress(zmq.Again):
            for _ in range(20_000):
                raw.send_multipart([b"1", hello])
        assert client.greet(FINGERPRINT, soon()) == WELCOME


# --- servers that misbehave


def test_a_late_answer_is_not_taken_for_the_next_one(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """The false server answers each question twice; the second answer arrives before the next question's."""
    valid = iter([True, False])

    def answer_twice(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        reply = protocol.encode(ReadEnded(next(valid)))
        router.send_multipart([frames[0], frames[1], reply])
        router.send_multipart([frames[0], frames[1], reply])

    with false_server(context, answer_twice) as port, ControlClient(context, "127.0.0.1", port) as client:
        assert client.end_read("a", "reader", 0, soon()) is True
        assert client.end_read("b", "reader", 0, soon()) is False


def test_an_answer_after_the_deadline_is_not_taken_for_the_next_one(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    questions: list[list[bytes]] = []

    def answer_late(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        questions.append(frames)
        if len(questions) == 2:
            for valid, (identity, sequence, _) in zip([True, False], questions, strict=True):
                router.send_multipart([identity, sequence, protocol.encode(ReadEnded(valid))])

    with false_server(context, answer_late) as port, ControlClient(context, "127.0.0.1", port) as client:
        with pytest.raises(DeadlineError):
            client.end_read("a", "reader", 0, time.monotonic() + 0.1)
        assert client.end_read("b", "reader", 0, soon()) is False


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ([b"\xc1"], ProtocolError),
        ([b"\x82\xa4type\xa7refused\xa3why\xa2\xff\xfe"], ProtocolError),
        ([protocol.encode(WELCOME)], ProtocolError),
        ([protocol.encode(ReadEnded(True)), b"one frame too many"], DeadlineError),
        ([], DeadlineError),
    ],
)
def test_what_is_no_answer_fails(
    context: zmq.Context[zmq.Socket[bytes]], reply: list[bytes], error: type[Exception]
) -> None:
    def answer(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        router.send_multipart([*frames[:2], *reply])

    with (
        false_server(context, answer) as port,
        ControlClient(context, "127.0.0.1", port) as client,
        pytest.raises(error),
    ):
        client.end_read("a", "reader", 0, time.monotonic() + 0.3)


def test_a_flood_of_wrong_answers_meets_the_deadline(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    def flood(router: zmq.Socket[bytes], frames: list[bytes]) -> None:
        deadline = time.monotonic() + 0.6
        while time.monotonic() < deadline:
            with contextlib.suppress(zmq.Again):
                router.send_multipart([frames[0], b"another", b"x"], zmq.NOBLOCK)

    with false_server(context, flood) as port, ControlClient(context, "127.0.0.1", port) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            client.greet(FINGERPRINT, began + 0.2)
        assert time.monotonic() - began < 0.5


def test_a_server_that_is_gone_meets_the_deadline(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    prefill = Prefill()
    with ControlClient(context, "127.0.0.1", prefill.port) as client:
        assert client.greet(FINGERPRINT, soon()) == WELCOME
        prefill.close()
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=str(prefill.port)):
            client.end_read("lease", "reader", 0, began + 0.2)
        assert time.monotonic() - began < 1


def test_a_deadline_that_is_over(client: ControlClient) -> None:
    with pytest.raises(DeadlineError):
        client.greet(FINGERPRINT, time.monotonic() - 1)
    assert client.greet(FINGERPRINT, soon()) == WELCOME


@pytest.mark.parametrize("host", ["", "not a host", "\ud800", "a\x00b", "x" * 512, "*"])
def test_a_host_that_cannot_be_is_a_transfer_error(context: zmq.Context[zmq.Socket[bytes]], host: str) -> None:
    with ControlClient(context, host, 9000) as client, pytest.raises((PeerUnreachableError, DeadlineError)):
        client.greet(FINGERPRINT, time.monotonic() + 0.1)


def test_ending_the_context_ends_a_wait() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    errors: list[BaseException] = []

    def wait() -> None:
        with ControlClient(context, "127.0.0.1", 9) as client:
            try:
                client.greet(FINGERPRINT, soon())
            except PeerUnreachableError as error:
                errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.05)
    ending = threading.Thread(target=context.term, daemon=True)
    ending.start()
    ending.join(timeout=5)
    assert not ending.is_alive()
    waiting.join(timeout=5)
    assert len(errors) == 1


# --- the server's own life


def test_closing_ends_the_thread_and_every_descriptor() -> None:
    files = set(os.listdir("/proc/self/fd"))
    threads = {thread.ident for thread in threading.enumerate()}
    prefill = Prefill()
    prefill.close()
    prefill.close()  # twice is once
    assert {thread.ident for thread in threading.enumerate()} == threads
    assert len(os.listdir("/proc/self/fd")) <= len(files)


def test_a_wake_up_after_closing_touches_no_other_file() -> None:
    prefill = Prefill()
    assert prefill.server is not None
    wake_fd = prefill.server._wake_fd
    reader, writer = os.pipe()
    prefill.close()
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
    assert prefill.server is not None
    ident = prefill.server._thread.ident
    assert ident is not None
    clock = time.pthread_getcpuclockid(ident)
    before_s = time.clock_gettime(clock)
    time.sleep(1)
    assert time.clock_gettime(clock) - before_s < 0.005
