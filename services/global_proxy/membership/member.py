"""What is known of the instances: plain data, the same in every process of the proxy and on its channels."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Self, get_args
from urllib.parse import urlsplit

Role = Literal["prefill", "decode", "mixed"]  # mixed: a plain engine, prefill and decode together
Source = Literal["file", "joined", "admin"]  # named at the start, by its own agent, through the admin API
DrainState = Literal["active", "draining"]

ROLES: tuple[Role, ...] = get_args(Role)
_ONLY_OF: Mapping[str, tuple[Role, ...]] = MappingProxyType(
    {"kv_address": ("prefill",), "bootstrap_url": ("prefill",), "kv_events": ("prefill", "mixed")}
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_ADDRESS_CHARS = 300  # a DNS name has 253 at most
_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+(%25[a-z0-9._-]+)?\]")  # a name, an IPv4 address, or IPv6 in brackets


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One engine's api server, and how others reach its KV.

    Raises:
        ValueError: naming the field, its value and what to do.

    Attributes:
        url: http://HOST:PORT or https://HOST:PORT, without a path.
        kv_address: HOST:PORT where a prefill instance is asked for KV (hand-off layer by layer).
        bootstrap_url: a prefill instance's bootstrap server (Mooncake).
        kv_events: HOST:PORT where it tells what its prefix cache holds; the next port replays it. Not of a D, whose
            prompts come from P.
    """

    role: Role
    url: str
    kv_address: str | None = None
    bootstrap_url: str | None = None
    kv_events: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: must be one of {', '.join(ROLES)}, got {_shown(self.role)}")
        for field, url in (("url", self.url), ("bootstrap_url", self.bootstrap_url)):
            if url is not None:
                _check_url(field, url)
        for field, address in (("kv_address", self.kv_address), ("kv_events", self.kv_events)):
            if address is not None:
                _check_address(field, address)
        for field, roles in _ONLY_OF.items():
            if self.role not in roles and getattr(self, field) is not None:
                value = _shown(getattr(self, field))
                raise ValueError(f"{field}: only a {' or '.join(roles)} instance has one, got {value}: leave it out")

    @property
    def name(self) -> str:
        """HOST:PORT, in lower case, the port always there: what the instance is called everywhere."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition(":")[0] if parts.port is not None else parts.netloc
        return f"{host.lower()}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


@dataclass(frozen=True, slots=True)
class Member:
    """An instance that the proxy knows.

    Attributes:
        slot: its index in the load table; no other instance has it until every worker has forgotten this one.
        state: a draining instance finishes what it has and is given nothing new.
        source: who named it. What the deployment file names stays when its agent leaves or crashes.
    """

    spec: InstanceSpec
    slot: int
    state: DrainState
    source: Source

    @property
    def name(self) -> str:
        return self.spec.name

    def but(self, state: DrainState) -> Self:
        return self if state == self.state else replace(self, state=state)


@dataclass(frozen=True, slots=True)
class State:
    """All that the registry decides; `version` grows by one with each change."""

    version: int
    members: tuple[Member, ...]
    prefill_policy: str
    decode_policy: str
    mixed_policy: str = "prefix_aware"

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What an instance says of its own load. Tokens of KV are those of its whole KV cache.

    Raises:
        ValueError: a number is negative.
    """

    num_running: int
    num_waiting: int
    kv_used_tokens: int
    kv_total_tokens: int
    at_s: float  # when it was taken, on the monotonic clock of the proxy's host

    def __post_init__(self) -> None:
        for field in ("num_running", "num_waiting", "kv_used_tokens", "kv_total_tokens"):
            if not 0 <= getattr(self, field) < 2**63:
                raise ValueError(f"{field}: must be 0 or more, below 2**63, got {getattr(self, field)}")


def _check_url(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_good = (
            parts.scheme in _DEFAULT_PORTS
            and not (parts.path or parts.query or parts.fragment)
            and url == f"{parts.scheme}://{parts.netloc}"  # urlsplit drops tabs and line ends without a word
            and _is_host_and_port(parts.netloc, needs_port=False)
        )
    except ValueError:  # a port that is no number, brackets that do not match
        is_good = False
    if not is_good:
        raise ValueError(f"{field}: must be http://HOST:PORT or https://HOST:PORT, without a path, got {_shown(url)}")


def _check_address(field: str, address: str) -> None:
    try:
        is_good = _is_host_and_port(address, needs_port=True)
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"{field}: must be HOST:PORT, got {_shown(address)}")


def _is_host_and_port(text: str, *, needs_port: bool) -> bool:
    """Raises ValueError for a port that is none."""
    parts = urlsplit(f"//{text}")
    if parts.port == 0 or (parts.port is None and (needs_port or text.endswith(":"))):
        return False
    host = text.rpartition(":")[0] if parts.port is not None else text
    return len(text) <= _MAX_ADDRESS_CHARS and _HOST.fullmatch(host.lower()) is not None


def _shown(value: object) -> str:
    """For a message: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
