"""What breaks things: signals to an engine's processes, strangers' bytes, and a client that hangs up."""

import json
import os
import secrets
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.e2e.deployments import Server, eventually
from tests.e2e.equality import COMPLETIONS, completion
from tests.e2e.kv_faults.engines import MAX_MODEL_LEN, NUM_RUNNING

NUM_QUEUED = 8  # one generation takes some seconds, on a fast machine
_TIMEOUT_S = 10


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all at once; returns when they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it died with its parent
            process.kill()
    assert not psutil.wait_procs(processes, timeout=_TIMEOUT_S)[1]


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """SIGSTOP to all, SIGCONT at the end."""
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


def shared_memory_of(pid: int) -> list[Path]:
    """The files in /dev/shm that an engine's processes have made."""
    return list(Path("/dev/shm").glob(f"omni_*_{pid}_*"))  # noqa: S108


class HungUp:
    """A request whose client leaves: sent at once, broken off at the end of the block."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        address = urlsplit(server.url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60)
        content = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def read_some(self) -> bytes:
        """Wait for the answer to begin."""
        return self._socket.recv(65536)

    def __enter__(self) -> "HungUp":
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()


@contextmanager
def busy(decode: Server) -> Iterator[None]:
    """Long generations, for as long as the block: as many as this engine runs at once, and NUM_QUEUED that are before
    all that comes now.
    """
    with ExitStack() as stack:
        for number in range(NUM_RUNNING + NUM_QUEUED):
            prompt = f"busy {number} " * 10
            body = completion(prompt, max_tokens=MAX_MODEL_LEN - 200, ignore_eos=True, stream=True)
            client = stack.enter_context(HungUp(decode, body))
            if number < NUM_RUNNING:
                client.read_some()
        assert eventually(lambda: decode.metric("vllm:num_requests_waiting") == NUM_QUEUED, _TIMEOUT_S)
        yield


def waits_at(decode: Server) -> bool:
    """Whether a request waits at a busy engine."""
    return decode.metric("vllm:num_requests_waiting") > NUM_QUEUED


def garbage() -> list[bytes]:
    """What strangers may send: noise, other protocols, and lies about lengths."""
    zmq_greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00"
    return [
        secrets.token_bytes(4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + secrets.token_bytes(200),  # TLS
        zmq_greeting + b"NULL".ljust(20, b"\0") + bytes(32),
        zmq_greeting + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x04\xc8\x05HELLO" + secrets.token_bytes(194),
        zmq_greeting + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x06" + struct.pack(">Q", 1 << 62),
        struct.pack("<I", 0xFFFFFFFF) + b"\x81" * 100,
        struct.pack("<I", 900) + b"\xdf" + b"\xff" * 899,  # a map of four thousand million entries
        struct.pack("<I", 8) + b"\x91" * 8,
        struct.pack("<I", 500) + b"\x00",  # and no more
        b"",
    ]


def send_garbage(host: str, port: int) -> None:
    """Each on a connection of its own, as fast as they are taken."""
    for noise in garbage():
        with suppress(OSError), socket.create_connection((host, port), timeout=_TIMEOUT_S) as stranger:
            stranger.sendall(noise)


@contextmanager
def many_connections(host: str, port: int, count: int) -> Iterator[None]:
    """Connections that say nothing."""
    strangers = []
    try:
        for _ in range(count):
            strangers.append(socket.create_connection((host, port), timeout=_TIMEOUT_S))
        yield
    finally:
        for stranger in strangers:
            stranger.close()
