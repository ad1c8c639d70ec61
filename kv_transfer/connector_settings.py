"""What the engine's `--kv-transfer-config` says about us."""

import math
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class ConnectorSettings:
    """`kv_connector_extra_config`, with what else both halves need."""

    engine_id: str
    is_producer: bool
    is_consumer: bool
    block_size: int  # tokens
    tp_size: int
    listen_host: str = "127.0.0.1"
    lease_s: float = 30.0
    load_timeout_s: float = 30.0
    num_load_threads: int = 4
    checksum: bool = False

    def __post_init__(self) -> None:
        for name in ("lease_s", "load_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"kv_connector_extra_config.{name} is {value!r}; it must be a number above 0")
        if type(self.num_load_threads) is not int or self.num_load_threads < 1:
            raise ValueError(
                f"kv_connector_extra_config.num_load_threads is {self.num_load_threads!r}; "
                "it must be a whole number above 0"
            )
        if not isinstance(self.checksum, bool):
            raise ValueError(f"kv_connector_extra_config.checksum is {self.checksum!r}; it must be true or false")
        if not isinstance(self.listen_host, str) or self.listen_host in ("", "0.0.0.0", "::"):
            raise ValueError(
                f"kv_connector_extra_config.listen_host is {self.listen_host!r}; peers connect to it, so it must be an "
                "address of this host"
            )
        if self.is_producer:
            self._check_listen_host()

    def _check_listen_host(self) -> None:
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
        if parallel.pipeline_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
            raise ValueError("OmniConnector moves KV between engines without pipeline and context parallelism")
        extra: dict[str, Any] = dict(transfer.kv_connector_extra_config)
        known = {"listen_host", "lease_s", "load_timeout_s", "num_load_threads", "checksum"}
        if unknown := sorted(set(extra) - known):
            raise ValueError(f"kv_connector_extra_config has unknown fields {unknown}; known are {sorted(known)}")
        return cls(
            engine_id=transfer.engine_id or "",
            is_producer=transfer.is_kv_producer,
            is_consumer=transfer.is_kv_consumer,
            block_size=vllm_config.cache_config.block_size,
            tp_size=parallel.tensor_parallel_size,
            **extra,
        )
