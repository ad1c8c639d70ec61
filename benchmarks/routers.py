"""How the routers of others are started: nginx as a reverse proxy, and vllm-router before a P and a D."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench_proxy.processes import find_program
from benchmarks.servers import free_port

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
    upstream servers {{
        {servers}
        keepalive 2048;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {health}
        location / {{
            proxy_pass http://servers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_next_upstream off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def nginx() -> str | None:
    """Where it is; None: it is not installed."""
    return find_program("nginx")


def nginx_command(port: int, server_ports: Sequence[int], folder: Path, *, answers_health: bool = False) -> list[str]:
    """One worker before servers of this host, round robin.

    Args:
        folder: for its configuration and its files.
        answers_health: itself, without asking a server.
    """
    config = folder / "nginx.conf"
    servers = " ".join(f"server 127.0.0.1:{server_port} max_fails=0;" for server_port in server_ports)
    health = "location = /health { return 200; }" if answers_health else ""
    config.write_text(_NGINX_CONFIG.format(folder=folder, port=port, servers=servers, health=health))
    return [nginx() or "nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]


def vllm_router() -> str | None:
    """Where it is, this environment's own first; None: its Python package is not installed."""
    return shutil.which("vllm-router", path=str(Path(sys.executable).parent)) or find_program("vllm-router")


def vllm_router_command(port: int, prefill_url: str, decode_url: str, *, at_its_fastest: bool = True) -> list[str]:
    """Before one P and one D with vLLM's NixlConnector.

    Args:
        at_its_fastest: by turns and without a log; False: its defaults, which look at prompts and log requests.
    """
    fastest = ("--policy", "round_robin", "--log-level", "warning") if at_its_fastest else ()
    return [
        vllm_router() or "vllm-router",
        *("--vllm-pd-disaggregation", "--kv-connector", "nixl", *fastest),
        *("--prefill", prefill_url, "--decode", decode_url),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
        *("--worker-startup-check-interval", "1", "--worker-startup-timeout-secs", "60"),
    ]
