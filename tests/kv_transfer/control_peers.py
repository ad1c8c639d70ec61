"""P's control plane, and raw zmq sockets that ask it, for tests in which a peer misbehaves."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import zmq
from zmq.utils import z85

from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from kv_transfer.control import ControlServer
from kv_transfer.prefill.lease import LeaseTable
from kv_transfer.protocol import (
    Fingerprint,
    RankEndpoint,
    RankInfo,
    RankLayout,
    Welcome,
)
from tests.kv_transfer.rank_peers import KEY

FINGERPRINT = Fingerprint(vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16")
RANK = RankInfo(
    endpoint=RankEndpoint("127.0.0.1", 9000, "rank run"), layout=RankLayout(block_sizes=(16,), layers=()), offers=()
)
WELCOME = Welcome("run", (RANK,))
NONCE = b"n" * NONCE_BYTES

Context = zmq.Context[zmq.Socket[bytes]]


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
        self.leases = LeaseTable(lease_s=lease_s, max_lease_s=10 * lease_s, on_change=self._on_change, clock=self.clock)
        self.server = ControlServer(host, 0, KEY, WELCOME, FINGERPRINT, self.leases)
        self.port = self.server.port
        self.dropped = self.server.dropped

    def _on_change(self) -> None:
        if self.server is not None:
            self.server.wake()

    @property
    def thread(self) -> threading.Thread:
        assert self.server is not None
        return self.server._thread

    def close(self) -> None:
        assert self.server is not None
        self.server.close()


def use_key(raw: zmq.Socket[bytes], key: DeploymentKey) -> None:
    raw.curve_serverkey = zmq.curve_public(z85.encode(key.mac("control port")))
    raw.curve_publickey, raw.curve_secretkey = zmq.curve_keypair()


@contextlib.contextmanager
def raw_peer(context: Context, port: int, key: DeploymentKey | None = KEY) -> Iterator[zmq.Socket[bytes]]:
    """A zmq socket that sends what the test likes. Without a key, it speaks as zmq does without security."""
    with context.socket(zmq.DEALER) as raw:
        raw.linger = 1000 if key is KEY else 0
        if key is not None:
            use_key(raw, key)
        raw.connect(f"tcp://127.0.0.1:{port}")
        yield raw


@contextlib.contextmanager
def false_server(
    context: Context, answer: Callable[[zmq.Socket[bytes], list[bytes]], None], key: DeploymentKey = KEY
) -> Iterator[int]:
    """A stand-in for P's control server which answers each request as it likes."""
    with context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.curve_server = True
        router.curve_secretkey = z85.encode(key.mac("control port"))
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
