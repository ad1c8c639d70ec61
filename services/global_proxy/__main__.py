"""`python -m services.global_proxy --prefill URL --decode URL`: serve until told to stop."""

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import uvicorn

from kv_transfer.auth import default_key_path
from omni.process import obey_parent
from services.global_proxy.app import Proxy
from services.global_proxy.settings import Connector, Mode, Settings

_KEEPALIVE_S = 75  # longer than what load balancers keep idle connections for
_LAST_CLOSE_S = 2  # for connections that outlive the drain


class DrainingServer(uvicorn.Server):
    """Goes on listening while requests in flight finish, so that /health says 503 and /live 200 until the end."""

    def __init__(self, config: uvicorn.Config, proxy: Proxy) -> None:
        super().__init__(config)
        self._proxy = proxy

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._proxy.in_flight.drain(self._proxy.settings.drain_timeout_s)
        await super().shutdown(sockets)


def make_server(proxy: Proxy, host: str, port: int) -> DrainingServer:
    config = uvicorn.Config(
        proxy.app,
        host=host,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEPALIVE_S,
        timeout_graceful_shutdown=_LAST_CLOSE_S,
    )
    return DrainingServer(config, proxy)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, int, Settings]:
    """Host, port and settings; exits with status 2 and a message when they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m services.global_proxy", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL", help="may be repeated")
    parser.add_argument("--decode", action="append", required=True, metavar="URL", help="may be repeated")
    parser.add_argument(
        "--connector", choices=get_args(Connector), default=Settings.connector, help="the engines' KV connector"
    )
    parser.add_argument(
        "--mode", choices=get_args(Mode), default=Settings.mode, help="omni: layerwise has P and D work at once"
    )
    parser.add_argument(
        "--kv-address",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="layerwise: where a --prefill is asked for KV; as many as these, in their order",
    )
    parser.add_argument(
        "--bootstrap",
        action="append",
        default=[],
        metavar="URL",
        help="mooncake: the bootstrap server of a --prefill; as many as these, in their order",
    )
    parser.add_argument("--key-file", type=Path, default=default_key_path(), help="omni: the deployment key")
    parser.add_argument("--request-timeout-s", type=float, default=Settings.request_timeout_s)
    parser.add_argument("--connect-timeout-s", type=float, default=Settings.connect_timeout_s)
    parser.add_argument("--drain-timeout-s", type=float, default=Settings.drain_timeout_s)
    options = parser.parse_args(arguments)
    try:
        settings = Settings(
            prefill_urls=tuple(url.rstrip("/") for url in options.prefill),
            decode_urls=tuple(url.rstrip("/") for url in options.decode),
            connector=options.connector,
            mode=options.mode,
            kv_addresses=tuple(options.kv_address),
            bootstrap_urls=tuple(url.rstrip("/") for url in options.bootstrap),
            key_file=options.key_file,
            request_timeout_s=options.request_timeout_s,
            connect_timeout_s=options.connect_timeout_s,
            drain_timeout_s=options.drain_timeout_s,
        )
    except ValueError as error:
        parser.error(str(error))
    return options.host, options.port, settings


def main() -> None:
    obey_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.raiseExceptions = False  # a full disk loses log lines, not requests
    host, port, settings = parse_arguments(sys.argv[1:])
    try:
        proxy = Proxy(settings)
    except ValueError as error:
        print(f"--key-file: {error}", file=sys.stderr)
        sys.exit(2)
    # uvicorn raises the signal again once it has stopped: that was the plan, not a failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    make_server(proxy, host, port).run()


if __name__ == "__main__":
    main()
