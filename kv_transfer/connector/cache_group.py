"""KV cache groups: layers that share a block table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_transfer.memory.blocks import BlockTables

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


@dataclass(frozen=True)
class CacheGroup:
    block_size: int  # tokens
    window: int | None  # how many tokens attention reaches back, itself included; None: all

    @classmethod
    def of(cls, spec: "KVCacheSpec") -> "CacheGroup":
        """Raises ValueError: what this group keeps is not a prompt's keys and values."""
        from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs

        layer = next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if not isinstance(layer, AttentionSpec):
            raise ValueError(
                f"OmniConnector cannot hand off a {type(layer).__name__}: it moves the KV of attention layers only. "
                "Serve this model with mixed prefill and decode"
            )
        return cls(spec.block_size, getattr(layer, "sliding_window", None))

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def first_token_needed(self, num_tokens: int) -> int:
        """The first token whose KV the last of `num_tokens` attends to."""
        return 0 if self.window is None else max(0, num_tokens - self.window)


def cache_groups(kv_cache_config: "KVCacheConfig") -> tuple[CacheGroup, ...]:
    """Raises ValueError like `CacheGroup.of`."""
    return tuple(CacheGroup.of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups)


def first_blocks(groups: tuple[CacheGroup, ...], block_ids: tuple[list[int], ...], num_tokens: int) -> BlockTables:
    """The part of each group's block table that the first `num_tokens` tokens use."""
    return tuple(tuple(ids[: group.num_blocks(num_tokens)]) for group, ids in zip(groups, block_ids, strict=True))
