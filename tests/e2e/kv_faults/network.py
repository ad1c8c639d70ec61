"""A network that can be cut, slowed and lied on: a namespace behind a pair of virtual interfaces."""

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_COMMANDS = ("ip", "tc", "iptables")

Relay = Callable[[socket.socket, socket.socket], int]  # client, server: moves the server's bytes; returns how many


def missing_for_namespaces() -> str:
    """Why none can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    return f"{', '.join(missing)} not installed: `make system-deps` does it" if missing else ""


class Namespace:
    """One network namespace; `host` is its address, `outside` that of this side."""

    def __init__(self, number: int) -> None:
        self.name = f"omni-test-{os.getpid()}"
        self.outside, self.host = f"10.231.{number}.1", f"10.231.{number}.2"
        self._ends = (f"omni{number}a", f"omni{number}b")
        self.prefix = ["ip", "netns", "exec", self.name]

    def make(self) -> None:
        outer, inner = self._ends
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        _run("ip", "link", "set", inner, "netns", self.name)
        _run("ip", "addr", "add", f"{self.outside}/30", "dev", outer)
        _run("ip", "link", "set", outer, "up")
        self._inside("ip", "addr", "add", f"{self.host}/30", "dev", inner)
        self._inside("ip", "link", "set", inner, "up")
        self._inside("ip", "link", "set", "lo", "up")

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", self._ends[0])
        with suppress(subprocess.CalledProcessError):
            _run("ip", "netns", "del", self.name)

    @contextmanager
    def cut(self, ports: Iterable[int]) -> Iterator[None]:
        """What is sent to these ports vanishes; all others work."""
        with self._rules("INPUT", [("-p", "tcp", "--dport", str(port), "-j", "DROP") for port in ports]):
            yield

    @contextmanager
    def lossy(self, share: float) -> Iterator[None]:
        """This share of all packets is lost, each way."""
        rule = ("-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        with self._rules("INPUT", [rule]), self._rules("OUTPUT", [rule]):
            yield

    @contextmanager
    def slow(self, bits_per_s: int) -> Iterator[None]:
        """What leaves the namespace, leaves it slowly."""
        inner = self._ends[1]
        rate = ("rate", str(bits_per_s), "burst", "16kb", "latency", "400ms")
        self._inside("tc", "qdisc", "add", "dev", inner, "root", "tbf", *rate)
        try:
            yield
        finally:
            self._inside("tc", "qdisc", "del", "dev", inner, "root")

    @contextmanager
    def relayed(self, port: int, relay: Relay) -> Iterator[list[int]]:
        """New connections from outside to `port` come to a relay; old ones break. Yields how many bytes each got."""
        relayed: list[int] = []
        listener = self._call(lambda: socket.create_server((self.host, 0)))

        def accept() -> None:
            self._enter()  # its threads are there, too
            with suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    server = socket.create_connection((self.host, port), timeout=10)
                    threading.Thread(target=_relay, args=(client, server, relay, relayed), daemon=True).start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        redirect = ("-p", "tcp", "--dport", str(port), "-j", "REDIRECT", "--to-ports", str(listener.getsockname()[1]))
        try:
            with self._rules("PREROUTING", [redirect], table="nat"):
                yield relayed
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(timeout=10)
            listener.close()

    @contextmanager
    def _rules(self, chain: str, rules: Iterable[tuple[str, ...]], table: str = "filter") -> Iterator[None]:
        made = []
        try:
            for rule in rules:
                self._inside("iptables", "-w", "-t", table, "-A", chain, *rule)
                made.append(rule)
            yield
        finally:
            for rule in made:
                self._inside("iptables", "-w", "-t", table, "-D", chain, *rule)

    def _inside(self, *command: str) -> None:
        _run(*self.prefix, *command)

    def _enter(self) -> None:
        """Move this thread into the namespace, for good."""
        with Path("/run/netns", self.name).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns failed")

    def _call(self, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket stays in the namespace in which it was made."""
        made: list[socket.socket] = []

        def enter_and_make() -> None:
            self._enter()
            made.append(make())

        thread = threading.Thread(target=enter_and_make)
        thread.start()
        thread.join(timeout=10)
        return made[0]


def corrupting(after_bytes: int) -> Relay:
    """Turns one bit of what the server sends, so far into the connection."""

    def relay(client: socket.socket, server: socket.socket) -> int:
        num_bytes = 0
        while data := bytearray(server.recv(65536)):
            if num_bytes <= after_bytes < num_bytes + len(data):
                data[after_bytes - num_bytes] ^= 1
            num_bytes += len(data)
            client.sendall(data)
        return num_bytes

    return relay


def truncating(after_bytes: int) -> Relay:
    """Ends the connection after so many of the server's bytes."""

    def relay(client: socket.socket, server: socket.socket) -> int:
        num_bytes = 0
        while num_bytes < after_bytes and (data := server.recv(min(65536, after_bytes - num_bytes))):
            num_bytes += len(data)
            client.sendall(data)
        return num_bytes

    return relay


def _relay(client: socket.socket, server: socket.socket, relay: Relay, relayed: list[int]) -> None:
    """Both ways until either ends: the client's bytes as they are, the server's by `relay`."""

    def upstream() -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    server.settimeout(None)
    thread = threading.Thread(target=upstream, daemon=True)
    thread.start()
    with client, server:
        with suppress(OSError):
            relayed.append(relay(client, server))
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30, capture_output=True)
