"""What the proxy is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kv_transfer.auth import default_key_path
from services.global_proxy.membership.member import InstanceSpec, Role

Connector = Literal["omni", "nixl", "mooncake"]
Mode = Literal["pull", "layerwise"]
Fallback = Literal["none", "decode_only"]

_SECONDS = (
    *("request_timeout_s", "connect_timeout_s", "body_timeout_s", "drain_timeout_s", "reader_timeout_s"),
    *("health_interval_s", "health_timeout_s"),
)

_LEAST = {
    "control_port": 0,
    "health_misses": 1,
    "max_active_per_decode": 1,
    "max_n": 1,
    "max_queue_s": 0,
    "max_queued": 0,
    "max_retries": 0,
    "min_prefill_tokens": 0,
    "num_workers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Addresses, limits and deadlines.

    Raises:
        ValueError: naming the field and what to do.
    """

    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    mixed_urls: tuple[str, ...] = ()  # plain engines, prefill and decode together
    connector: Connector = "omni"  # the engines' KV connector: ours, or one of vLLM's
    mode: Mode = "pull"  # omni: whether D reads a prompt's KV when all of it is computed, or layer by layer
    bootstrap_urls: tuple[str, ...] = ()  # mooncake: of each P's bootstrap server, in the order of prefill_urls
    kv_addresses: tuple[str, ...] = ()  # layerwise: HOST:PORT where each P is asked for KV, in that order
    kv_events: tuple[str, ...] = ()  # HOST:PORT where each P, or P and mixed, publishes what its prefix cache holds
    key_file: Path = field(default_factory=default_key_path)  # omni: the deployment key
    request_timeout_s: float = 600.0  # from the first byte of a request to the last of its answer
    connect_timeout_s: float = 5.0  # to an engine, name lookup included; a lost SYN is sent again after 1 s and 3 s
    body_timeout_s: float = 30.0  # for a client to send its body
    drain_timeout_s: float = 30.0  # for requests in flight when the proxy is told to stop
    reader_timeout_s: float = 30.0  # for a client that takes nothing of its answer
    prefill_policy: str = "prefix_aware"
    decode_policy: str = "pd_score_balance"
    mixed_policy: str = "prefix_aware"
    max_retries: int = 2  # of one request, with other instances
    fallback: Fallback = "none"  # decode_only: while no P is up, D computes prompts too
    min_prefill_tokens: int | None = None  # shorter prompts go to D alone; None: found from what was seen; 0: none do
    continue_streams: bool = True  # where D is lost mid-stream and another can go on exactly
    max_active_per_decode: int = 256  # requests in flight for each D or mixed; vLLM's own --max-num-seqs
    max_queued: int = 1024  # requests that wait for a place, in each worker
    max_queue_s: float = 30.0  # how long they do
    api_keys_file: Path | None = None  # hashed keys; without it everybody is let in
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    otlp_endpoint: str | None = None  # http://HOST:4318 of an OpenTelemetry collector
    trace_sample_ratio: float = 0.01
    num_workers: int = 1
    control_port: int | None = None  # where instances join; 0: any free one
    health_interval_s: float = 1.0  # between two health checks of an instance
    health_timeout_s: float = 5.0  # for one answer: an engine that waits for a core is late, not dead
    health_misses: int = 3  # so many in a row make an instance unhealthy
    max_body_bytes: int = 16 * 1024 * 1024
    max_body_bytes_total: int = 256 * 1024 * 1024  # received and not yet answered, in each worker
    max_n: int = 128  # OpenAI's own limit on `n`

    def __post_init__(self) -> None:
        self._check_instances()
        for name, urls in self._urls:
            if len(set(urls)) != len(urls):
                raise ValueError(f"--{name}: the same URL is given twice")
            for url in urls:
                _check_url(name, url)
        self._check_connector()
        self._check_numbers()
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("--tls-certificate, --tls-key: give both or none")

    @property
    def _urls(self) -> tuple[tuple[Role, tuple[str, ...]], ...]:
        return ("prefill", self.prefill_urls), ("decode", self.decode_urls), ("mixed", self.mixed_urls)

    def _check_instances(self) -> None:
        if self.control_port is not None:
            return
        if not (self.prefill_urls or self.decode_urls or self.mixed_urls):
            raise ValueError(
                "no instances: give --prefill URL and --decode URL, or --mixed URL for plain engines, or a"
                " --control-port for instances to join"
            )
        for name, urls in self._urls[:2]:
            if not urls and (self.prefill_urls or self.decode_urls):
                raise ValueError(f"--{name}: give at least one URL, or a --control-port for instances to join")

    def _check_numbers(self) -> None:
        for name in _SECONDS:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be more than 0 seconds, got {getattr(self, name)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: must be {least} or more, got {value}")
        if self.max_body_bytes_total < self.max_body_bytes:
            least = self.max_body_bytes
            raise ValueError(f"max_body_bytes_total: must be max_body_bytes ({least}) or more")

    @staticmethod
    def default_key_file() -> Path:
        return default_key_path()

    def _check_connector(self) -> None:
        if self.mode == "layerwise" and self.connector != "omni":
            raise ValueError(f"--mode layerwise: --connector {self.connector} cannot do it")
        for url in self.bootstrap_urls:
            _check_url("bootstrap", url)
        for address in self.kv_addresses:
            _check_address("kv-address", address)
        for option, given, needed_by, needed in (
            ("--bootstrap", self.bootstrap_urls, "--connector mooncake", self.connector == "mooncake"),
            ("--kv-address", self.kv_addresses, "--mode layerwise", self.mode == "layerwise"),
        ):
            if needed and len(given) != len(self.prefill_urls):
                raise ValueError(f"{option}: {needed_by} needs one for each --prefill, in the same order")
            if given and not needed:
                raise ValueError(f"{option}: only {needed_by} needs it")
        for address in self.kv_events:
            _check_address("kv-events", address)
        num_prefill, num_all = len(self.prefill_urls), len(self.prefill_urls) + len(self.mixed_urls)
        if len(self.kv_events) not in (0, num_prefill, num_all):
            raise ValueError(
                "--kv-events: give one for each --prefill, in the same order; or for --mixed, too, after these; or none"
            )

    def specs(self) -> list[InstanceSpec]:
        """The instances that are there from the start."""
        kv_addresses = self.kv_addresses or (None,) * len(self.prefill_urls)
        bootstrap_urls = self.bootstrap_urls or (None,) * len(self.prefill_urls)
        num_prefill = len(self.prefill_urls)
        kv_events = self.kv_events[:num_prefill] or (None,) * num_prefill
        kv_events_of_mixed = self.kv_events[num_prefill:] or (None,) * len(self.mixed_urls)
        return [
            *(
                InstanceSpec("prefill", *addresses)
                for addresses in zip(self.prefill_urls, kv_addresses, bootstrap_urls, kv_events, strict=True)
            ),
            *(InstanceSpec("decode", url) for url in self.decode_urls),
            *(
                InstanceSpec("mixed", url, kv_events=events)
                for url, events in zip(self.mixed_urls, kv_events_of_mixed, strict=True)
            ),
        ]


def _check_url(name: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.fragment:
        raise ValueError(f"--{name} {url!r}: must be http://HOST:PORT, without a path")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"--{name} {url!r}: {error}") from error


def _check_address(name: str, address: str) -> None:
    try:
        parts = urlsplit(f"//{address}")
        is_whole = parts.netloc == address and parts.hostname and parts.port
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"--{name} {address!r}: must be HOST:PORT")
