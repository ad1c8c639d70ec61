"""What the proxy is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kv_transfer.auth import default_key_path

Connector = Literal["omni", "nixl", "mooncake"]
Mode = Literal["pull", "layerwise"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Addresses, limits and deadlines.

    Raises:
        ValueError: naming the field and what to do.
    """

    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    connector: Connector = "omni"  # the engines' KV connector: ours, or one of vLLM's
    mode: Mode = "pull"  # omni: whether D reads a prompt's KV when all of it is computed, or layer by layer
    bootstrap_urls: tuple[str, ...] = ()  # mooncake: of each P's bootstrap server, in the order of prefill_urls
    kv_addresses: tuple[str, ...] = ()  # layerwise: HOST:PORT where each P is asked for KV, in that order
    key_file: Path = field(default_factory=default_key_path)  # omni: the deployment key
    request_timeout_s: float = 600.0  # from the first byte of a request to the last of its answer
    connect_timeout_s: float = 5.0  # to an engine, name lookup included; a lost SYN is sent again after 1 s and 3 s
    body_timeout_s: float = 30.0  # for a client to send its body
    drain_timeout_s: float = 30.0  # for requests in flight when the proxy is told to stop
    max_body_bytes: int = 16 * 1024 * 1024
    max_n: int = 128  # OpenAI's own limit on `n`

    def __post_init__(self) -> None:
        for name, urls in (("prefill", self.prefill_urls), ("decode", self.decode_urls)):
            if not urls:
                raise ValueError(f"--{name}: give at least one URL")
            if len(set(urls)) != len(urls):
                raise ValueError(f"--{name}: the same URL is given twice")
            for url in urls:
                _check_url(name, url)
        self._check_connector()
        for name in ("request_timeout_s", "connect_timeout_s", "body_timeout_s", "drain_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be more than 0 seconds, got {getattr(self, name)}")

    def _check_connector(self) -> None:
        if self.mode == "layerwise" and self.connector != "omni":
            raise ValueError(f"--mode layerwise: --connector {self.connector} cannot do it")
        for url in self.bootstrap_urls:
            _check_url("bootstrap", url)
        for address in self.kv_addresses:
            _check_address(address)
        for option, given, needed_by, needed in (
            ("--bootstrap", self.bootstrap_urls, "--connector mooncake", self.connector == "mooncake"),
            ("--kv-address", self.kv_addresses, "--mode layerwise", self.mode == "layerwise"),
        ):
            if needed and len(given) != len(self.prefill_urls):
                raise ValueError(f"{option}: {needed_by} needs one for each --prefill, in the same order")
            if given and not needed:
                raise ValueError(f"{option}: only {needed_by} needs it")


def _check_url(name: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.fragment:
        raise ValueError(f"--{name} {url!r}: must be http://HOST:PORT, without a path")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"--{name} {url!r}: {error}") from error


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(f"//{address}")
        is_whole = parts.netloc == address and parts.hostname and parts.port
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"--kv-address {address!r}: must be HOST:PORT")
