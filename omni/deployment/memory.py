"""How much memory an engine takes, and how large its KV cache is to be.

Sizes are of a whole engine (one DP rank): vLLM's --kv-cache-memory-bytes is of one worker (TP rank).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from omni.deployment.model_info import ModelInfo

GIB = 1 << 30

# Measured with vLLM 0.32 on a CPU: api server 0.6 GiB, EngineCore 0.6 GiB, a worker's own needs 0.4 GiB, less what
# they share. Engines forked from one parent share more of it and need less.
ENGINE_BASE_BYTES = int(1.3 * GIB)
EXTRA_WORKER_BYTES = int(0.4 * GIB)  # each worker after the first
PROXY_BYTES = int(0.2 * GIB)
SEQUENCES_WANTED = 4  # a KV cache for this many sequences of max_model_len, where memory allows
KEPT_FREE = 0.1  # of the available memory, for activations and for everything else on the machine


@dataclass(frozen=True, kw_only=True)
class KvNeed:
    """What one engine's KV cache must and may be, bytes."""

    block_bytes: int  # one KV block, on all TP ranks together
    blocks_per_sequence: int  # of a sequence of max_model_len
    written_bytes: int | None = None  # kv_cache_gib, if given

    @property
    def least_bytes(self) -> int:
        """One whole sequence. vLLM refuses to start with less; it keeps one block for itself."""
        return (self.blocks_per_sequence + 1) * self.block_bytes

    @property
    def wanted_bytes(self) -> int:
        return (SEQUENCES_WANTED * self.blocks_per_sequence + 1) * self.block_bytes


def kv_need(
    model: ModelInfo, *, dtype: str, tp: int, block_size: int, max_model_len: int, kv_cache_gib: float | None
) -> KvNeed:
    return KvNeed(
        block_bytes=block_size * model.kv_bytes_per_token(dtype, tp) * tp,
        blocks_per_sequence=-(-max_model_len // block_size),
        written_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
    )


def engine_bytes_without_kv(model: ModelInfo, dtype: str, num_workers: int) -> int:
    return ENGINE_BASE_BYTES + (num_workers - 1) * EXTRA_WORKER_BYTES + model.weight_bytes_as(dtype)


def kv_sizes(needs: Sequence[KvNeed], available_bytes: int, other_bytes: Iterable[int]) -> list[int]:
    """KV bytes per engine: as written, else what it wants but no more than an equal share of what remains.

    Never less than one sequence: whether everything fits is for `omni.deployment.checks` to say, with the numbers.
    """
    remaining = int(available_bytes * (1 - KEPT_FREE)) - sum(other_bytes)
    remaining -= sum(need.written_bytes or 0 for need in needs)
    share = remaining // max(1, sum(need.written_bytes is None for need in needs))
    return [need.written_bytes or max(need.least_bytes, min(need.wanted_bytes, share)) for need in needs]
