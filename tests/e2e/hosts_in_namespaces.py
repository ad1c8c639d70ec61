"""Hosts for tests: network namespaces on a bridge, each with an address, an sshd, a home and processes of its own.

What a host has at SITE and in /root is its own too, at the same paths on all of them, as on real machines. The password
of root is one that only they know: each sees an /etc/shadow of its own. Needs root, iproute2 and openssh-server.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.deployments import REPOSITORY

SSHD = "/usr/sbin/sshd"
PASSWORD = "correct horse {{ battery }} staple"  # noqa: S105 (opens hosts of a test, which nobody else can reach)
_START_TIMEOUT_S = 20
_PROGRAMS = (sys.base_prefix, str(REPOSITORY))  # hosts have this Python and this code, wherever they are

# The first process of a host: it takes in orphans, as init does, and with it all end.
_INIT = """
set -e
mount --make-rprivate /
for shared in $SHARED; do
    mkdir -p "$HOST$shared"
    mount --bind "$shared" "$HOST$shared"
done
mount --rbind "$HOST/root" /root
mount --bind "$HOST/site" "$SITE"
mount --bind "$HOST/shadow" /etc/shadow
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
mkdir /run/sshd
hostname "$NAME"
{sshd} -D -e -f "$HOST/sshd_config" >> "$HOST/sshd.log" 2>&1 < /dev/null &
while :; do wait; sleep 1; done
"""


def missing() -> str | None:
    """What this machine lacks for such hosts."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", SSHD, "ssh", "unshare"):
        if shutil.which(program) is None:
            return f"needs {program}"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "needs namespaces"


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    folder: Path  # what is its own
    site: Path
    namespace: str
    _init: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Returns when its sshd answers."""
        env = {"PATH": os.environ["PATH"], "HOST": str(self.folder), "SITE": str(self.site), "NAME": self.name}
        env["SHARED"] = " ".join(path for path in _PROGRAMS if path.startswith("/root/"))
        command = [
            *("ip", "netns", "exec", self.namespace),
            *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c", _INIT.format(sshd=SSHD)),
        ]
        self._init = subprocess.Popen(command, env=env)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            assert self._init.poll() is None, (self.folder / "sshd.log").read_text()
            assert time.monotonic() < deadline, f"no sshd at {self.address}"
            time.sleep(0.05)

    def kill(self) -> None:
        """All that runs on it, at once, as when its power fails."""
        if self._init is None:
            return
        traces = self._traces()
        self._init.send_signal(signal.SIGKILL)
        self._init.wait(timeout=30)
        self._init = None
        for path in Path(tempfile.gettempdir()).glob(traces):
            shutil.rmtree(path, ignore_errors=True)

    def run(self, *command: str) -> str:
        """What a command prints there."""
        assert self._init is not None, f"{self.name} is down"
        inside = ["nsenter", "--target", self._first_process(), "--mount", "--net", "--pid", "--uts", *command]
        return subprocess.run(inside, capture_output=True, text=True, check=True, timeout=60).stdout

    def processes(self) -> list[str]:
        """The command lines of all that runs there, but init, sshd and what asks."""
        lines = self.run("ps", "-e", "-o", "args=").splitlines()
        system = ("sh -c", "ps -e", "sshd", SSHD, "sleep 1", "[")
        return [line for line in lines if not line.startswith(system)]

    def _first_process(self) -> str:
        assert self._init is not None
        return Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()[0]

    def _traces(self) -> str:
        """What killed engines leave in the temporary folder: their next start there would remove it (omni.process)."""
        return f"omni_{os.stat(f'/proc/{self._first_process()}/ns/pid').st_ino}_*"

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


@dataclass(frozen=True)
class Site:
    """Some hosts and how to log in to them."""

    hosts: tuple[Host, ...]
    private_key: Path
    path: Path  # the folder that is each host's own
    env: dict[str, str]  # for Ansible and ssh on this machine

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)


@contextmanager
def site_of(folder: Path, names: tuple[str, ...]) -> Iterator[Site]:
    """Starts hosts; ends them and all that runs on them."""
    tag = f"{random.randrange(1 << 24):06x}"
    subnet = f"10.{random.randrange(130, 250)}.{random.randrange(1, 250)}"
    bridge = f"omb{tag}"
    private_key = _make_key(folder / "keys")
    path = folder / "site"
    path.mkdir()
    ansible = Path(f"/tmp/om{tag}")  # noqa: S108 (a socket's path must be short)
    hosts: list[Host] = []
    links: list[str] = []
    try:
        ansible.mkdir(mode=0o700)
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            host = Host(
                name, f"{subnet}.{11 + number}", _own_folder(folder / name, private_key), path, f"om{tag}{name}"
            )
            hosts.append(host)
            links.append(f"v{tag}{number}")
            _connect(host, bridge, links[-1])
            host.start()
        yield Site(tuple(hosts), private_key, path, _environment(folder, ansible))
    finally:
        for host in hosts:
            host.kill()
        for control in ansible.glob("cp*/*"):
            subprocess.run(["ssh", "-o", f"ControlPath={control}", "-O", "exit", "x"], capture_output=True, check=False)
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
        # A link goes with its namespace, unless a mount namespace of somebody else keeps a copy of that.
        for link in (*links, bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        shutil.rmtree(ansible, ignore_errors=True)


def _environment(folder: Path, ansible: Path) -> dict[str, str]:
    """What a test's ssh remembers is forgotten with it."""
    known_hosts = f"-o UserKnownHostsFile={folder / 'known_hosts'} -o GlobalKnownHostsFile=/dev/null"
    return {
        "ANSIBLE_HOME": str(ansible),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(ansible / "cp"),
        "ANSIBLE_SSH_EXTRA_ARGS": known_hosts,
        "OMNI_STATE_DIR": str(folder / "state"),
    }


def _own_folder(folder: Path, private_key: Path) -> Path:
    for name in ("root/.ssh", "site"):
        (folder / name).mkdir(parents=True)
    (folder / "root/.ssh/authorized_keys").write_text(private_key.with_suffix(".pub").read_text())
    (folder / "root").chmod(0o700)
    host_key = folder / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
    (folder / "shadow").write_text(f"root:{_hashed(PASSWORD)}:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n")
    (folder / "shadow").chmod(0o600)
    lines = [
        *(f"HostKey {host_key}", "Port 22", "UsePAM no", "PermitRootLogin yes", "PasswordAuthentication yes"),
        *("StrictModes no", "PidFile none", "UseDNS no", "MaxStartups 100", "Subsystem sftp internal-sftp"),
    ]
    (folder / "sshd_config").write_text("\n".join((*lines, "")))
    return folder


def _make_key(folder: Path) -> Path:
    folder.mkdir()
    key = folder / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


def _hashed(password: str) -> str:
    done = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"], input=password, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _connect(host: Host, bridge: str, link: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", link, "master", bridge, "up")
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
