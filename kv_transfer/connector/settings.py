"""What the engine's `--kv-transfer-config` says about us."""

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kv_transfer.auth import DeploymentKey, default_key_path, load_key, load_or_make_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TransportName = Literal["auto", "shared_memory", "process_vm", "tcp", "hccl", "mooncake"]
Mode = Literal["pull", "layerwise"]

CHECKSUMMED_TRANSPORTS = ("auto", "tcp", "hccl")  # the others copy memory, or check what they move themselves
MAX_CONNECTIONS = 16  # of one pair of ranks


@dataclass(frozen=True, kw_only=True)
class ConnectorSettings:
    """`kv_connector_extra_config`, with what else both halves need. Scheduler and workers each make their own."""

    engine_id: str
    is_producer: bool
    is_consumer: bool
    block_size: int  # tokens
    tp_size: int
    pp_size: int
    key: DeploymentKey  # of `key_file`
    listen_host: str = "127.0.0.1"
    listen_port: int = 0  # of the control port; 0: the system's choice
    lease_s: float = 30.0
    max_lease_s: float = 600.0  # how long D may keep a lease alive by asking for more time
    load_timeout_s: float = 30.0
    num_load_threads: int = 4
    transport: TransportName = "auto"
    mode: Mode = "pull"
    num_connections: int = 1  # over TCP, of one pair of ranks
    checksum: bool = False

    def __post_init__(self) -> None:
        for name in ("lease_s", "max_lease_s", "load_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise _wrong(name, value, "a number above 0")
        for name, least, most in (
            ("num_load_threads", 1, 1024),
            ("num_connections", 1, MAX_CONNECTIONS),
            ("listen_port", 0, 65535),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise _wrong(name, value, f"a whole number from {least} to {most}")
        for name, known in (("transport", get_args(TransportName)), ("mode", get_args(Mode))):
            if getattr(self, name) not in known:
                raise _wrong(name, getattr(self, name), f"one of {', '.join(known)}")
        if not isinstance(self.checksum, bool):
            raise _wrong("checksum", self.checksum, "true or false")
        if self.checksum and self.transport not in CHECKSUMMED_TRANSPORTS:
            raise _wrong("checksum", True, f"false with transport {self.transport}, which has none")
        if self.max_lease_s < self.lease_s:
            raise _wrong("max_lease_s", self.max_lease_s, f"at least lease_s, which is {self.lease_s}")
        if not isinstance(self.listen_host, str) or self.listen_host in ("", "0.0.0.0", "::"):
            raise _wrong("listen_host", self.listen_host, "an address of this host: peers connect to it")
        if self.is_producer:
            self._check_listen_host()

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def _check_listen_host(self) -> None:
        """The host alone: of several processes with these settings one listens on `listen_port`."""
        try:
            family = socket.getaddrinfo(self.listen_host, None, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((self.listen_host, 0), family=family).close()
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"kv_connector_extra_config.listen_host is {self.listen_host!r}, where this host cannot listen "
                f"({error}); give one of its own addresses"
            ) from None

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "ConnectorSettings":
        """Raises ValueError, which names the field, its value and the mend."""
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1:
            raise ValueError(
                f"decode_context_parallel_size is {parallel.decode_context_parallel_size}; OmniConnector moves KV "
                "between engines without it: leave it at 1"
            )
        extra: dict[str, Any] = dict(transfer.kv_connector_extra_config)
        if unknown := sorted(set(extra) - set(_EXTRA_FIELDS)):
            raise ValueError(f"kv_connector_extra_config has unknown fields {unknown}; known are {_EXTRA_FIELDS}")
        key = load_deployment_key(extra)
        extra.pop("key_file", None)
        return cls(
            engine_id=transfer.engine_id or "",
            is_producer=transfer.is_kv_producer,
            is_consumer=transfer.is_kv_consumer,
            block_size=vllm_config.cache_config.block_size,
            tp_size=parallel.tensor_parallel_size,
            pp_size=parallel.pipeline_parallel_size,
            key=key,
            **extra,
        )


_EXTRA_FIELDS = [
    "checksum",
    "key_file",
    "lease_s",
    "listen_host",
    "listen_port",
    "load_timeout_s",
    "max_lease_s",
    "mode",
    "num_connections",
    "num_load_threads",
    "transport",
]


def load_deployment_key(extra_config: Mapping[str, Any]) -> DeploymentKey:
    """The key in `key_file`; else this user's own, which is made if it is not there.

    Raises:
        ValueError: there is no such key, or it is not safe; the message names the file and the mend.
    """
    key_file = extra_config.get("key_file")
    if key_file is None:
        return load_or_make_key(default_key_path())
    if not isinstance(key_file, str) or not key_file:
        raise _wrong("key_file", key_file, "the path of a file")
    try:
        return load_key(Path(key_file))
    except ValueError as error:
        raise ValueError(f"kv_connector_extra_config.key_file: {error}") from None


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"kv_connector_extra_config.{name} is {value!r}; it must be {allowed}")
