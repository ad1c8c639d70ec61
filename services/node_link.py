"""Ties together the hosts that one DP rank spans: when any of them ends, all do, and their supervisors start them anew.

vLLM's workers find one another once, at their start. A host that ends and comes back would wait for ever for partners
of its earlier life. The first node listens beside its api server; each of the others connects before it starts its
workers, and both ends take the end of that connection for the end of the other.
"""

import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from kv_transfer.auth import MAC_BYTES, NONCE_BYTES, DeploymentKey

logger = logging.getLogger(__name__)

_PURPOSE: Final = "omni node link"
_GREETING_S: Final = 5.0
_RETRY_S: Final = 0.5
_MAX_STRANGERS: Final = 16  # connections that have not said yet who they are
_NODE: Final = struct.Struct("!H")
# Notices within some 20 s that the other host has gone without a word.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

Ending = Callable[[str], None]


def end_process(reason: str) -> None:
    """Ends this process at once, with its engine: its partner is gone, so nothing in it can be finished."""
    print(f"this DP rank's {reason}: ending, to start again together", flush=True)
    os._exit(1)


class FirstNode:
    """What the node with the api server does: lets the others in and ends when one of them does.

    Args:
        address: host and port to listen on.
    """

    def __init__(self, address: tuple[str, int], key: DeploymentKey, on_end: Ending = end_process) -> None:
        self._key = key
        self._on_end = on_end
        self._strangers = threading.Semaphore(_MAX_STRANGERS)
        self._listener = socket.create_server(address)
        threading.Thread(target=self._accept, name="node link", daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._stay, args=(connection,), name="node link", daemon=True).start()

    def _stay(self, connection: socket.socket) -> None:
        with connection:
            try:
                node = self._greet(connection)
            finally:
                self._strangers.release()
            if node is None:
                return
            logger.info("node %d is here", node)
            _wait_for_end(connection)
        self._on_end(f"node {node} has ended")

    def _greet(self, connection: socket.socket) -> int | None:
        """The node that has proved to know the key; None: a stranger."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            connection.settimeout(_GREETING_S)
            connection.sendall(nonce)
            node = _receive(connection, _NODE.size)
            mac = _receive(connection, MAC_BYTES)
            if not self._key.is_mac(mac, _PURPOSE, nonce, node):
                return None
            connection.sendall(self._key.mac(_PURPOSE, node, nonce))
        except OSError:
            return None
        number: int = _NODE.unpack(node)[0]
        return number


def join_first_node(
    address: tuple[str, int], node: int, key: DeploymentKey, on_end: Ending = end_process, timeout_s: float = 1800.0
) -> None:
    """Returns once the first node is there; from then on its end is the end of this process.

    Raises:
        TimeoutError: it was not there in time, or does not have this deployment's key.
    """
    deadline_s = time.monotonic() + timeout_s
    said = ""
    while True:
        try:
            connection = _connect(address, node, key)
            break
        except OSError as error:
            text = f"node 0 at {address[0]}:{address[1]}: {error}"
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{text}, for {timeout_s:g} s")
        if text != said:
            logger.warning("waiting for %s", text)
            said = text
        time.sleep(_RETRY_S)

    def stay() -> None:
        with connection:
            _wait_for_end(connection)
        on_end("node 0 has ended")

    threading.Thread(target=stay, name="node link", daemon=True).start()


def _connect(address: tuple[str, int], node: int, key: DeploymentKey) -> socket.socket:
    with _closed_on_error(socket.create_connection(address, timeout=_GREETING_S)) as connection:
        nonce = _receive(connection, NONCE_BYTES)
        number = _NODE.pack(node)
        connection.sendall(number + key.mac(_PURPOSE, nonce, number))
        try:
            answer = _receive(connection, MAC_BYTES)
        except ConnectionError:
            raise ConnectionError("refuses: it needs the same deployment key") from None
        if not key.is_mac(answer, _PURPOSE, number, nonce):
            raise ConnectionError("does not have this deployment's key")
        return connection


@contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[socket.socket]:
    try:
        yield connection
    except BaseException:
        connection.close()
        raise


def _wait_for_end(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        while connection.recv(1):
            pass
    except OSError:  # reset, or no answer to keepalives
        return


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """Within _GREETING_S, however slowly the bytes come."""
    deadline_s = time.monotonic() + _GREETING_S
    received = b""
    while len(received) < num_bytes:
        connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("closed")
        received += part
    return received
