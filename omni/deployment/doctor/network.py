"""The deployment's hosts, as seen from here: names resolve, sshd answers, login keys are fit for use."""

import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from omni.deployment.doctor.finding import Finding, ok, problem, warning
from omni.deployment.machine import Machine
from omni.deployment.model import Access

SSH_PORT: Final = 22
_CONNECT_TIMEOUT_S: Final = 3.0
_NUM_AT_ONCE: Final = 64
_BANNER: Final = b"SSH-"


def addresses(machine: Machine, hosts: Sequence[str]) -> Iterator[Finding]:
    """Which of the file's hosts this machine is; without a file, what a file may name it."""
    own = sorted(machine.addresses - {"0.0.0.0"})
    here = [host for host in hosts if machine.is_host(host)]
    found = f"this machine is {', '.join(own)}"
    yield ok("network", "addresses", f"{found}; of the file's hosts: {', '.join(here) or 'none'}" if hosts else found)
    outside = [address for address in own if not address.startswith("127.") and address[0].isdigit()]
    if not outside:
        mend = "fine for one machine; for several, give it an address: ip addr"
        yield warning("network", "addresses", "none but loopback: other hosts cannot reach it", mend)


def ssh_hosts(hosts: Sequence[str], port: int = SSH_PORT) -> Iterator[Finding]:
    """One for each host that cannot be logged in to, and one for all that answer. All are asked at once."""
    with ThreadPoolExecutor(max_workers=min(_NUM_AT_ONCE, max(1, len(hosts)))) as pool:
        failures = dict(zip(hosts, pool.map(lambda host: _ssh_failure(host, port), hosts), strict=True))
    answering = [host for host, failure in failures.items() if failure is None]
    if answering:
        yield ok("network", "ssh", f"sshd answers on {', '.join(answering)}")
    for host, failure in failures.items():
        if failure is not None:
            mend = f"see `ssh -v {host}`: the address, the firewall, sshd there"
            yield problem("network", f"ssh {host}", failure, mend)


def _ssh_failure(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S) as connection:
            said = connection.recv(len(_BANNER))
    except TimeoutError:
        return f"port {port} gave no answer within {_CONNECT_TIMEOUT_S:g} s"
    except socket.gaierror:
        return "the name is not known here"
    except OSError as error:
        return f"port {port} cannot be reached ({error.strerror})"
    return None if said == _BANNER else f"what answers on port {port} is not sshd"


def login_keys(blocks: Iterable[Access]) -> Iterator[Finding]:
    """The private keys that these blocks of the file name: ssh itself refuses one that others can read."""
    for written in dict.fromkeys(block.private_key for block in blocks if block.private_key):
        yield _login_key(Path(written).expanduser())


def _login_key(path: Path) -> Finding:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return problem("key", f"private_key {path}", f"cannot be read ({error.strerror})", "write another private_key")
    if not stat.S_ISREG(mode) or not os.access(path, os.R_OK):
        mend = "write the path of a private key that this user can read"
        return problem("key", f"private_key {path}", "is not a file that this user can read", mend)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = f"is open to other users (mode {stat.S_IMODE(mode):o}), so ssh refuses it"
        return problem("key", f"private_key {path}", found, f"chmod 600 {path}")
    return ok("key", f"private_key {path}", f"mode {stat.S_IMODE(mode):o}")
