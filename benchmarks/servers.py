"""Where a benchmark's servers listen, and waiting for them."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.error import URLError
from urllib.request import urlopen

_TIMEOUT_S = 600.0


def free_port() -> int:
    """One of this host that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Ends the program if this process does, or if it takes too long."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if process is not None and process.poll() is not None:
            sys.exit(f"{' '.join(map(str, process.args))} ended with code {process.returncode}")  # type: ignore[arg-type]
        if time.monotonic() > deadline:
            sys.exit(f"gave up after {_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def is_healthy(url: str) -> bool:
    """Whether the server there answers /health with 200."""
    try:
        with urlopen(f"{url}/health", timeout=2) as response:  # noqa: S310 (our own servers)
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
