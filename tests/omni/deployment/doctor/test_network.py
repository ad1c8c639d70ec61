"""Real sockets that speak ssh's first words, other words, or nothing."""

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from omni.deployment.doctor import network
from omni.deployment.model import Access
from tests.omni.deployment.samples import machine


@pytest.fixture
def listener() -> Iterator[Callable[[bytes | None], int]]:
    """A function that listens and greets each comer with these bytes; None: with nothing. Returns the port."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(server: socket.socket, greeting: bytes) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # the test is over
                return
            with connection:
                connection.sendall(greeting)

    def listen(greeting: bytes | None) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)
        if greeting is not None:
            thread = threading.Thread(target=serve, args=(server, greeting))
            threads.append(thread)
            thread.start()
        port: int = server.getsockname()[1]
        return port

    yield listen
    for server in sockets:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_sshd(listener: Callable[[bytes | None], int]) -> None:
    port = listener(b"SSH-2.0-OpenSSH_9.2\r\n")
    (finding,) = network.ssh_hosts(["127.0.0.1", "localhost"], port)
    assert (finding.level, finding.found) == ("ok", "sshd answers on 127.0.0.1, localhost")


def test_what_is_not_sshd(listener: Callable[[bytes | None], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_CONNECT_TIMEOUT_S", 0.3)
    port = listener(b"HTTP/1.1 400")
    (finding,) = network.ssh_hosts(["127.0.0.1"], port)
    assert (finding.level, finding.found) == ("problem", f"what answers on port {port} is not sshd")
    port = listener(None)
    (finding,) = network.ssh_hosts(["127.0.0.1"], port)
    assert finding.found == f"port {port} gave no answer within 0.3 s"


def test_nobody_listens(free_ports: Callable[[int], int]) -> None:
    (finding,) = network.ssh_hosts(["127.0.0.1"], port := free_ports(1))
    assert (finding.subject, finding.found) == (
        "ssh 127.0.0.1",
        f"port {port} cannot be reached (Connection refused)",
    )
    assert finding.mend.startswith("see `ssh -v 127.0.0.1`")


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    (finding,) = network.ssh_hosts(["no-such-host"])
    assert finding.found == "the name is not known here"


def test_addresses() -> None:
    (finding,) = network.addresses(machine(), ["198.51.100.7", "198.51.100.8"])
    assert finding.found == ("this machine is 127.0.0.1, 198.51.100.7, localhost; of the file's hosts: 198.51.100.7")
    alone = replace(machine(), addresses=frozenset({"localhost", "127.0.0.1", "box"}))
    assert [f.level for f in network.addresses(alone, ())] == ["ok", "warning"]


def test_login_keys(tmp_path: Path) -> None:
    good, bad, folder = tmp_path / "good", tmp_path / "bad", tmp_path / "folder"
    good.touch(0o600)
    bad.touch()
    bad.chmod(0o644)
    folder.mkdir(0o700)
    names = (good, bad, folder, tmp_path / "missing", good)
    findings = list(network.login_keys([Access(private_key=str(name)) for name in names] + [Access()]))
    assert [f.level for f in findings] == ["ok", "problem", "problem", "problem"], "each key once"
    assert findings[1].found == "is open to other users (mode 644), so ssh refuses it"
    assert findings[1].mend == f"chmod 600 {bad}"
