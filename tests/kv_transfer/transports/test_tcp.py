# ruff: noqa: N806 - tensor names carry their shape
"""Real sockets, real memory; where a peer misbehaves, a stand-in peer plays its part."""

import contextlib
import os
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer import protocol
from kv_transfer.errors import (
    ChecksumError,
    DeadlineError,
    KVTransferError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.memory import BlockMemory, regions_of
from kv_transfer.protocol import FRAME_HEADER, BlocksFollow, RankEndpoint, ReadBlocks, ReadEnded, Refused
from kv_transfer.transports import tcp
from kv_transfer.transports.tcp import TcpTransport

N, T, D = 64, 4, 8  # blocks; tokens, head dimension
BLOCK_BYTES = 2 * T * D * 2  # K and V, 16 bits

Peer = Callable[[socket.socket], None]


def random_cache(seed: int, num_blocks: int = N) -> torch.Tensor:
    return torch.randint(0, 1 << 15, (2, num_blocks, T, D), dtype=torch.int16, generator=torch.manual_seed(seed))


def soon() -> float:
    return time.monotonic() + 20


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


class Side:
    """A transport and the KV cache under it."""

    def __init__(self, seed: int, *, num_blocks: int = N, checksum: bool = False) -> None:
        self.kv_2NTD = random_cache(seed, num_blocks)
        self.transport = TcpTransport(BlockMemory(regions_of({"0": self.kv_2NTD}, num_blocks)), checksum=checksum)


@pytest.fixture
def prefill() -> Iterator[Side]:
    side = Side(1)
    yield side
    side.transport.close()


@pytest.fixture(params=[False, True], ids=["plain", "checksum"])
def decode(request: pytest.FixtureRequest) -> Iterator[Side]:
    side = Side(2, checksum=request.param)
    yield side
    side.transport.close()


@pytest.fixture
def checking() -> Iterator[Side]:
    side = Side(2, checksum=True)
    yield side
    side.transport.close()


@contextlib.contextmanager
def peer(*answers: Peer) -> Iterator[RankEndpoint]:
    """A stand-in for P that gives each connection the next of these answers, then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in answers:
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
            thread.join(timeout=10)
        assert not thread.is_alive()


def receive_request(connection: socket.socket) -> ReadBlocks:
    (size,) = FRAME_HEADER.unpack(connection.recv(FRAME_HEADER.size, socket.MSG_WAITALL))
    request = protocol.decode_request(connection.recv(size, socket.MSG_WAITALL))
    assert isinstance(request, ReadBlocks)
    return request


def frame(message: protocol.Request | protocol.Reply) -> bytes:
    data = protocol.encode(message)
    return FRAME_HEADER.pack(len(data)) + data


def answers(data: bytes) -> Peer:
    def answer(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(data)

    return answer


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


# --- bytes


@pytest.mark.parametrize(
    ("remote_ids", "local_ids"),
    [
        ([3], [5]),
        ([0, 1, 2, 3], [60, 61, 62, 63]),
        ([9, 4, 7], [1, 2, 3]),
        ([1, 2, 3], [9, 4, 7]),
        (list(range(N)), list(reversed(range(N)))),
        ([], []),
    ],
)
def test_blocks_land_exactly(prefill: Side, decode: Side, remote_ids: list[int], local_ids: list[int]) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    expected_2NTD = decode.kv_2NTD.clone()
    expected_2NTD[:, local_ids] = prefill.kv_2NTD[:, remote_ids]
    sent = prefill.kv_2NTD.clone()
    num_bytes = decode.transport.read(endpoint, remote_ids, local_ids, soon())
    assert num_bytes == len(remote_ids) * BLOCK_BYTES
    assert torch.equal(decode.kv_2NTD, expected_2NTD)
    assert torch.equal(prefill.kv_2NTD, sent)


def test_more_buffers_than_one_call_takes_and_partial_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single blocks in random order are a buffer each; tiny socket buffers make every call a partial one."""
    num_blocks = 3 * tcp._BUFFERS_PER_CALL
    create_server, create_connection = socket.create_server, socket.create_connection

    def small_server(*args: object, **kwargs: object) -> socket.socket:
        listener = create_server(*args, **kwargs)  # type: ignore[arg-type]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    def small_connection(*args: object, **kwargs: object) -> socket.socket:
        connection = create_connection(*args, **kwargs)  # type: ignore[arg-type]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return connection

    monkeypatch.setattr(socket, "create_server", small_server)
    monkeypatch.setattr(socket, "create_connection", small_connection)
    prefill, decode = Side(1, num_blocks=num_blocks), Side(2, num_blocks=num_blocks, checksum=True)
    rng = random.Random(5)
    remote_ids, local_ids = rng.sample(range(num_blocks), num_blocks), rng.sample(range(num_blocks), num_blocks)
    try:
        endpoint = prefill.transport.serve("127.0.0.1")
        decode.transport.read(endpoint, remote_ids, local_ids, soon())
        assert torch.equal(decode.kv_2NTD[:, local_ids], prefill.kv_2NTD[:, remote_ids])
    finally:
        prefill.transport.close()
        decode.transport.close()


def test_bytes_that_come_one_at_a_time(decode: Side) -> None:
    block = os.urandom(BLOCK_BYTES)

    def trickle(connection: socket.socket) -> None:
        request = receive_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        checksum = zlib.crc32(block).to_bytes(4, "little") if request.checksum else b""
        for byte in frame(BlocksFollow(BLOCK_BYTES)) + block + checksum:
            connection.sendall(bytes([byte]))

    with peer(trickle) as endpoint:
        assert decode.transport.read(endpoint, [0], [5], soon()) == BLOCK_BYTES
    assert decode.kv_2NTD[:, 5].contiguous().flatten().view(torch.uint8).numpy().tobytes() == block


def test_many_threads_read_at_once(prefill: Side, decode: Side) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(decode.transport.read, endpoint, [block], [(block + 7) % N], soon()) for block in range(N)]
        assert sum(read.result() for read in reads) == N * BLOCK_BYTES
    assert torch.equal(decode.kv_2NTD.roll(-7, dims=1), prefill.kv_2NTD)


def test_over_ipv6(prefill: Side, decode: Side) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        endpoint = prefill.transport.serve("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    decode.transport.read(endpoint, [1], [2], soon())
    assert torch.equal(decode.kv_2NTD[:, 2], prefill.kv_2NTD[:, 1])


# --- refusals


def test_blocks_of_an_engine_that_was_restarted_are_refused(prefill: Side, decode: Side) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    stale = RankEndpoint(endpoint.host, endpoint.port, "an earlier run")
    before = decode.kv_2NTD.clone()
    with pytest.raises(PeerRefusedError, match="restarted"):
        decode.transport.read(stale, [1], [2], soon())
    assert torch.equal(decode.kv_2NTD, before)


@pytest.mark.parametrize("remote_ids", [[N], [0, N], [(1 << 31) - 1]])
def test_blocks_that_do_not_exist_are_refused(prefill: Side, decode: Side, remote_ids: list[int]) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    with pytest.raises(PeerRefusedError, match="block ids must lie in"):
        decode.transport.read(endpoint, remote_ids, list(range(len(remote_ids))), soon())
    decode.transport.read(endpoint, [1], [2], soon())  # P goes on serving


# --- peers that misbehave


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", PeerUnreachableError),
        (b"\x01\x00", PeerUnreachableError),
        (FRAME_HEADER.pack(10) + b"abc", PeerUnreachableError),
        (frame(BlocksFollow(BLOCK_BYTES)), PeerUnreachableError),
        (frame(BlocksFollow(BLOCK_BYTES)) + b"x" * (BLOCK_BYTES - 1), PeerUnreachableError),
        (frame(BlocksFollow(BLOCK_BYTES - 1)) + b"x" * BLOCK_BYTES, ProtocolError),
        (frame(BlocksFollow(1 << 60)), ProtocolError),
        (frame(ReadEnded(True)), ProtocolError),
        (frame(ReadBlocks("run", (1,))), ProtocolError),
        (FRAME_HEADER.pack(0), ProtocolError),
        (FRAME_HEADER.pack(protocol.MAX_FRAME_BYTES + 1) + b"x" * 100, ProtocolError),
        (FRAME_HEADER.pack((1 << 32) - 1), ProtocolError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (frame(Refused("busy")), PeerRefusedError),
    ],
)
def test_what_is_no_answer_fails_the_read(decode: Side, data: bytes, error: type[KVTransferError]) -> None:
    with peer(answers(data)) as endpoint, pytest.raises(error):
        decode.transport.read(endpoint, [0], [0], soon())
    assert not decode.transport._reading
    assert not decode.transport._idle


def test_a_connection_reset_is_unreachable(decode: Side) -> None:
    def reset(connection: socket.socket) -> None:
        receive_request(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    with peer(reset) as endpoint, pytest.raises(PeerUnreachableError, match=endpoint.host):
        decode.transport.read(endpoint, [0], [0], soon())


def test_bytes_that_changed_on_the_way_are_noticed(checking: Side) -> None:
    block = bytearray(os.urandom(BLOCK_BYTES))
    checksum = zlib.crc32(block).to_bytes(4, "little")
    block[BLOCK_BYTES // 2] ^= 1
    with peer(answers(frame(BlocksFollow(BLOCK_BYTES)) + block + checksum)) as endpoint, pytest.raises(ChecksumError):
        checking.transport.read(endpoint, [0], [0], soon())


def test_memory_that_changes_while_it_is_sent_is_noticed(prefill: Side, checking: Side) -> None:
    """P's checksum is taken of its memory, not of what it sent."""
    send_all = tcp._send_all

    def send_and_overwrite(connection: socket.socket, buffers: list[memoryview]) -> None:
        send_all(connection, buffers)
        prefill.kv_2NTD[:, 1] += 1

    endpoint = prefill.transport.serve("127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tcp, "_send_all", send_and_overwrite)
        with pytest.raises(ChecksumError):
            checking.transport.read(endpoint, [1], [1], soon())
    checking.transport.read(endpoint, [1], [1], soon())


@pytest.mark.parametrize(
    "start", [b"", frame(BlocksFollow(BLOCK_BYTES))[:3], frame(BlocksFollow(BLOCK_BYTES)) + b"x" * 10]
)
def test_a_peer_that_stops_answering_meets_the_deadline(decode: Side, start: bytes) -> None:
    def stall(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(start)
        says_nothing(connection)

    with peer(stall) as endpoint:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=str(endpoint.port)):
            decode.transport.read(endpoint, [0], [0], began + 0.2)
        assert 0.15 < time.monotonic() - began < 2


def test_a_peer_that_trickles_meets_the_deadline(decode: Side) -> None:
    """Each byte comes in time; the deadline is that of the whole read."""

    def trickle(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(frame(BlocksFollow(BLOCK_BYTES)))
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    with peer(trickle) as endpoint:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            decode.transport.read(endpoint, [0], [0], began + 0.2)
        assert time.monotonic() - began < 2


def test_a_deadline_that_is_over_is_not_waited_for(prefill: Side, decode: Side) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    with pytest.raises(DeadlineError):
        decode.transport.read(endpoint, [1], [2], time.monotonic() - 1)
    decode.transport.read(endpoint, [1], [2], soon())
    with pytest.raises(DeadlineError):  # a connection is at hand now
        decode.transport.read(endpoint, [1], [2], time.monotonic() - 1)


def test_nothing_is_written_after_a_failed_read(decode: Side) -> None:
    go_on = threading.Event()

    def late(connection: socket.socket) -> None:
        receive_request(connection)
        go_on.wait(5)
        connection.sendall(frame(BlocksFollow(BLOCK_BYTES)) + b"x" * (BLOCK_BYTES + 4))

    before = decode.kv_2NTD.clone()
    with peer(late) as endpoint:
        with pytest.raises(DeadlineError):
            decode.transport.read(endpoint, [0], [0], time.monotonic() + 0.1)
        go_on.set()
    assert torch.equal(decode.kv_2NTD, before)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 100, "\ud800", "a\x00b", "127.0.0.1"])
def test_a_peer_that_is_not_there_is_unreachable(decode: Side, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerUnreachableError):
        decode.transport.read(RankEndpoint(host, port, "run"), [0], [0], soon())


# --- clients that misbehave


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        FRAME_HEADER.pack((1 << 32) - 1),
        FRAME_HEADER.pack(0),
        FRAME_HEADER.pack(40) + b"\x84\xa4type\xa8end_read\xa8lease_id\xa2\xff\xfe\xa6reader\xa1a\xa4rank\xc0",
        frame(BlocksFollow(4)),
        frame(protocol.EndRead("lease", "reader", None)),
        os.urandom(1000),
    ],
)
def test_garbage_ends_its_connection_and_nothing_else(prefill: Side, decode: Side, data: bytes) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as connection:
        connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    decode.transport.read(endpoint, [1], [2], soon())
    assert torch.equal(decode.kv_2NTD[:, 2], prefill.kv_2NTD[:, 1])


def test_a_request_that_never_ends_is_dropped(prefill: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_PEER_TIMEOUT_S", 0.1)
    endpoint = prefill.transport.serve("127.0.0.1")
    with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as connection:
        connection.sendall(b"\x05")
        assert connection.recv(1) == b""


def test_a_reader_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_PEER_TIMEOUT_S", 0.1)
    prefill = Side(1, num_blocks=200_000)  # 26 MB: more than the sockets hold
    endpoint = prefill.transport.serve("127.0.0.1")
    with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as connection:
        connection.sendall(frame(ReadBlocks(endpoint.run_id, tuple(range(200_000)))))
        until(lambda: bool(prefill.transport._serving), "the connection was not taken")
        until(lambda: not prefill.transport._serving, "the connection was kept")
    prefill.transport.close()


def test_connections_beyond_the_limit_are_closed(prefill: Side, decode: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_MAX_CONNECTIONS", 2)
    endpoint = prefill.transport.serve("127.0.0.1")
    address = (endpoint.host, endpoint.port)
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(address, timeout=5))
        with socket.create_connection(address, timeout=5) as refused:
            assert refused.recv(1) == b""
    until(lambda: not prefill.transport._serving, "the places were not given back")
    decode.transport.read(endpoint, [1], [2], soon())


def test_accepting_survives_a_lack_of_file_descriptors_and_of_threads(
    prefill: Side, decode: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    start, accept, lacks = threading.Thread.start, socket.socket.accept, ["thread", "descriptor"]

    def start_or_fail(thread: threading.Thread) -> None:
        if thread.name == "kv-blocks" and "thread" in lacks:
            lacks.remove("thread")
            raise RuntimeError("can't start new thread")
        start(thread)

    def accept_or_fail(listener: socket.socket) -> tuple[socket.socket, object]:
        if "thread" not in lacks and "descriptor" in lacks:
            lacks.remove("descriptor")
            raise OSError(24, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    monkeypatch.setattr(socket.socket, "accept", accept_or_fail)
    with pytest.raises(PeerUnreachableError):
        decode.transport.read(endpoint, [1], [2], soon())
    decode.transport.read(endpoint, [1], [2], soon())
    assert not lacks


# --- connections


def test_connections_are_used_again(prefill: Side, decode: Side) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    for block in range(20):
        decode.transport.read(endpoint, [block], [block], soon())
    assert len(prefill.transport._serving) == 1
    assert [len(idle) for idle in decode.transport._idle.values()] == [1]


def test_a_connection_that_failed_is_not_used_again(decode: Side) -> None:
    good = frame(BlocksFollow(BLOCK_BYTES)) + bytes(BLOCK_BYTES) + zlib.crc32(bytes(BLOCK_BYTES)).to_bytes(4, "little")
    with peer(answers(frame(BlocksFollow(1)) + b"rest of the first answer"), answers(good)) as endpoint:
        with pytest.raises(ProtocolError):
            decode.transport.read(endpoint, [0], [0], soon())
        decode.transport.read(endpoint, [0], [0], soon())


def test_a_connection_that_the_peer_closed_meanwhile_is_not_used(decode: Side) -> None:
    checksum = zlib.crc32(bytes(BLOCK_BYTES)).to_bytes(4, "little") if decode.transport._checksum else b""
    good = answers(frame(BlocksFollow(BLOCK_BYTES)) + bytes(BLOCK_BYTES) + checksum)
    with peer(good, good, good) as endpoint:
        for _ in range(3):
            decode.transport.read(endpoint, [0], [0], soon())
            (connection,) = decode.transport._idle[endpoint]
            until(lambda c=connection: not tcp._is_quiet(c), "the peer did not close")  # type: ignore[misc]


def test_connections_to_peers_that_left_are_closed(prefill: Side, decode: Side) -> None:
    """A restarted P has a new run_id, so nobody would ever ask for the old connections again."""
    endpoint = prefill.transport.serve("127.0.0.1")
    decode.transport.read(endpoint, [1], [2], soon())
    prefill.transport.close()
    restarted = Side(3)
    try:
        decode.transport.read(restarted.transport.serve("127.0.0.1"), [1], [2], soon())
        assert list(decode.transport._idle) != [endpoint]
        assert len(decode.transport._idle) == 1
    finally:
        restarted.transport.close()


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def kv_threads() -> set[str]:
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate() if thread.name.startswith("kv-")}


def test_close_ends_every_thread_and_closes_every_socket() -> None:
    files, threads = num_open_files(), kv_threads()
    prefill, decode = Side(1), Side(2)
    endpoint = prefill.transport.serve("127.0.0.1")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda block: decode.transport.read(endpoint, [block], [block], soon()), range(32)))
    assert kv_threads() > threads
    prefill.transport.close()
    assert kv_threads() == threads
    decode.transport.close()
    prefill.transport.close()
    decode.transport.close()  # twice is once
    assert num_open_files() == files


def test_close_ends_reads_under_way_and_refuses_new_ones(decode: Side) -> None:
    with peer(says_nothing) as endpoint, ThreadPoolExecutor(1) as pool:
        read = pool.submit(decode.transport.read, endpoint, [0], [0], soon())
        until(lambda: bool(decode.transport._reading), "the read did not begin")
        decode.transport.close()
        with pytest.raises(PeerUnreachableError):
            read.result(timeout=5)
        with pytest.raises(PeerUnreachableError):
            decode.transport.read(endpoint, [0], [0], soon())


def test_a_transport_that_never_served_closes() -> None:
    Side(1).transport.close()


def test_an_idle_server_uses_no_cpu(prefill: Side, decode: Side) -> None:
    endpoint = prefill.transport.serve("127.0.0.1")
    decode.transport.read(endpoint, [1], [2], soon())
    threads = [prefill.transport._accepting, *prefill.transport._serving.values()]
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread and thread.ident]
    assert len(clocks) == 2
    before_s = sum(map(time.clock_gettime, clocks))
    time.sleep(0.5)
    assert sum(map(time.clock_gettime, clocks)) - before_s < 0.005
