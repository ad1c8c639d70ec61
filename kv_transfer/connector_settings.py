"""What the engine's `--kv-transfer-config` says about us."""

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
        for name in ("lease_s", "load_timeout_s", "num_load_threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"kv_connector_extra_config.{name} is {value!r}; it must be a number above 0")
        if not isinstance(self.checksum, bool):
            raise ValueError(f"kv_connector_extra_config.checksum is {self.checksum!r}; it must be true or false")
        if self.listen_host in ("", "0.0.0.0", "::"):
            raise ValueError(
                f"kv_connector_extra_config.listen_host is {self.listen_host!r}; peers connect to it, so it must be an "
                "address of this host"
            )

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
