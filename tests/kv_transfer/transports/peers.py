"""Workers of P and D for tests of transports over the rank server, and a relay between them that does harm.

`python -m tests.kv_transfer.transports.peers` is a worker of P in a process of its own.
"""

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import RankEndpoint, TcpOffer
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import KEY, dial, soon, until

REGION_BYTES = (3 << 20, 1 << 16, 5 << 20)
P_SEED, D_SEED = 1, 2


class Side:
    """One worker: regions with random content, and a transport over them."""

    def __init__(
        self,
        seed: int,
        *,
        region_bytes: Sequence[int] = REGION_BYTES,
        serves: bool = False,
        num_connections: int = 1,
        checksum: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in region_bytes]
        memory = Memory([Region(array.ctypes.data, array.nbytes) for array in self.arrays])
        self.server = RankServer("127.0.0.1", KEY) if serves else None
        self.client = RankClient(KEY)
        self.transport = TcpTransport(
            memory, self.server, self.client, num_connections=num_connections, checksum=checksum
        )
        if self.server is not None:
            assert self.transport.offer() == TcpOffer()
            self.server.start()

    @property
    def endpoint(self) -> RankEndpoint:
        assert self.server is not None
        return self.server.endpoint

    def content(self) -> npt.NDArray[np.uint8]:
        return np.concatenate(self.arrays)

    def read(self, peer: RankEndpoint, spans: Spans, deadline: float | None = None) -> None:
        self.transport.read(peer, TcpOffer(), spans, soon() if deadline is None else deadline)

    def close(self) -> None:
        self.transport.close()
        self.client.close()
        if self.server is not None:
            self.server.close()


def spans_of(remote: Sequence[int], local: Sequence[int], sizes: Sequence[int]) -> Spans:
    return Spans(*(np.array(numbers, dtype=np.int64) for numbers in (remote, local, sizes)))


def everything(region_bytes: Sequence[int] = REGION_BYTES) -> Spans:
    """Each region in pieces of a megabyte, to where it came from."""
    starts = list(itertools.accumulate(region_bytes, initial=0))
    pieces = [
        (start + at, min(1 << 20, size - at))
        for start, size in zip(starts, region_bytes, strict=False)
        for at in range(0, size, 1 << 20)
    ]
    offsets = [offset for offset, _ in pieces]
    return spans_of(offsets, offsets, [size for _, size in pieces])


def shuffled(unit: int, most_units: int, num_spans: int, region_bytes: Sequence[int] = REGION_BYTES) -> Spans:
    """Spans of up to `most_units` times `unit` bytes, anywhere in P's memory, side by side but in any order in D's."""
    rng = np.random.default_rng(unit + num_spans)
    starts = np.array(list(itertools.accumulate(region_bytes, initial=0)))
    sizes = rng.integers(1, most_units + 1, num_spans) * unit
    slots = rng.permutation((starts[-1] - starts[-2]) // (unit * most_units))[:num_spans]
    local = starts[-2] + slots * unit * most_units  # in the last region
    regions = rng.integers(0, len(region_bytes), num_spans)
    room = (np.array(region_bytes)[regions] - sizes) // unit
    remote = starts[regions] + rng.integers(0, room + 1) * unit
    return Spans(remote, local, sizes)


def landed(spans: Spans, source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """D's memory once the spans have arrived."""
    expected = target.copy()
    for remote, local, size in zip(spans.remote.tolist(), spans.local.tolist(), spans.sizes.tolist(), strict=True):
        expected[local : local + size] = source[remote : remote + size]
    return expected


# --- a relay

Shape = Callable[[int, int, bytes], bytes | None]
"""(number of the connection, position in what P sends, its bytes) → what D gets instead; None closes both."""


@contextlib.contextmanager
def relay(target: RankEndpoint, shape: Shape) -> Iterator[RankEndpoint]:
    """Between D and P. What D sends is passed on as it is."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket, change: Callable[[int, bytes], bytes | None]) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                changed = change(position, data)
                if changed is None:
                    break
                sink.sendall(changed)
                position += len(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        for number in itertools.count():
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = dial(target)
            far.settimeout(None)
            sockets.extend((near, far))
            for args in (
                (near, far, lambda position, data: data),
                (far, near, lambda position, data, number=number: shape(number, position, data)),
            ):
                threads.append(threading.Thread(target=pump, args=args, daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield RankEndpoint("127.0.0.1", listener.getsockname()[1], target.run_id)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(timeout=10)
            for each in sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(timeout=10)
            for each in sockets:
                each.close()
            assert not any(thread.is_alive() for thread in threads)


class Gate:
    """Lets so many bytes of each connection through, and the rest once it is opened."""

    def __init__(self, num_bytes: int, connections: Sequence[int] | None = None) -> None:
        self._num_bytes = num_bytes
        self._connections = connections
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self.num_waiting = 0

    def __call__(self, number: int, position: int, data: bytes) -> bytes:
        is_gated = self._connections is None or number in self._connections
        if is_gated and position >= self._num_bytes and not self._opened.is_set():
            with self._lock:
                self.num_waiting += 1
            self._opened.wait(20)
        return data

    def open(self) -> None:
        self._opened.set()


# --- a process


@contextlib.contextmanager
def prefill_process() -> Iterator[tuple[RankEndpoint, "subprocess.Popen[str]"]]:
    """A worker of P with the content of `P_SEED`."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port, run_id = process.stdout.readline().split()
            yield RankEndpoint("127.0.0.1", int(port), run_id), process
        finally:
            process.kill()


def stop(process: "subprocess.Popen[str]") -> None:
    """As by SIGSTOP, and wait until each of its threads has stopped."""
    process.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{process.pid}/task").iterdir
    until(
        lambda: all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads()),
        "it does not stop",
    )


def main() -> None:
    side = Side(P_SEED, serves=True)
    print(side.endpoint.port, side.endpoint.run_id, flush=True)
    sys.stdin.read()
    side.close()


if __name__ == "__main__":
    main()
