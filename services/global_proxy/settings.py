"""What the proxy is told when it starts."""

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Addresses, limits and deadlines.

    Raises:
        ValueError: naming the field and what to do.
    """

    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    request_timeout_s: float = 600.0  # from the first byte of a request to the last of its answer
    connect_timeout_s: float = 2.0  # to an engine, name lookup included
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
        for field in ("request_timeout_s", "connect_timeout_s", "body_timeout_s", "drain_timeout_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}: must be more than 0 seconds, got {getattr(self, field)}")


def _check_url(name: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.fragment:
        raise ValueError(f"--{name} {url!r}: must be http://HOST:PORT, without a path")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"--{name} {url!r}: {error}") from error
