"""Who takes part: our proxy, vllm-router, nginx, and no proxy at all."""

import importlib.metadata
import shutil
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_proxy.processes import BenchmarkError, Process, find_program


@dataclass(frozen=True)
class Engines:
    """The two stand-ins on this host."""

    prefill_port: int
    decode_port: int
    processes: tuple[Process, ...]

    def check(self) -> None:
        """Raises BenchmarkError if one has ended."""
        for process in self.processes:
            if not process.is_running():
                raise BenchmarkError(f"a stand-in engine has died: {process.log_tail()}")

    @property
    def prefill_url(self) -> str:
        return f"http://127.0.0.1:{self.prefill_port}"

    @property
    def decode_url(self) -> str:
        return f"http://127.0.0.1:{self.decode_port}"


class Subject(ABC):
    """One way from a client to the engines."""

    name: str
    disaggregates = True  # asks P, then D

    def missing(self) -> str | None:
        """What it cannot run without and how to get it; None if all is there."""
        return None

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self, port: int, engines: Engines, folder: Path) -> list[str] | None:
        """How it is started so that it listens on `port`; None: there is nothing to start."""


class Ours(Subject):
    name = "ours"

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = arguments

    def version(self) -> str:
        return importlib.metadata.version("omni_infer")

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        command = [sys.executable, "-m", "services.global_proxy", "--port", str(port), "--connector", "nixl"]
        return [*command, "--prefill", engines.prefill_url, "--decode", engines.decode_url, *self._arguments]


class VllmRouter(Subject):
    name = "vllm-router"

    def missing(self) -> str | None:
        return None if self._program() else "its Python package is not installed: make install"

    def version(self) -> str:
        return importlib.metadata.version("vllm-router")

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        return [
            self._program() or "vllm-router",
            "--vllm-pd-disaggregation",
            *("--kv-connector", "nixl", "--policy", "round_robin", "--log-level", "warning"),
            *("--prefill", engines.prefill_url, "--decode", engines.decode_url),
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
            *("--worker-startup-check-interval", "1", "--worker-startup-timeout-secs", "30"),
        ]

    def _program(self) -> str | None:
        return shutil.which("vllm-router", path=str(Path(sys.executable).parent)) or find_program("vllm-router")


_NGINX_CONFIG = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_body_buffer_size 1m;
    keepalive_requests 100000000;
    tcp_nodelay on;
    upstream decode {{
        server 127.0.0.1:{decode_port};
        keepalive 2048;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://decode;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class Nginx(Subject):
    """A plain reverse proxy to D, with one worker: what relaying alone costs."""

    name = "nginx"
    disaggregates = False

    def missing(self) -> str | None:
        return None if find_program("nginx") else "nginx is not installed: make system-deps"

    def version(self) -> str:
        return "Debian's nginx"

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        config = folder / "nginx.conf"
        config.write_text(_NGINX_CONFIG.format(folder=folder, port=port, decode_port=engines.decode_port))
        return [find_program("nginx") or "nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]


class Direct(Subject):
    """D itself: the most that engines and load generator can do on their cores."""

    name = "direct"
    disaggregates = False

    def version(self) -> str:
        return "the stand-in engine"

    def command(self, port: int, engines: Engines, folder: Path) -> None:
        return None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
