"""A worker extension (vLLM's --worker-extension-cls): digests of the KV blocks, for comparing two engines' memories."""

import hashlib
from typing import Any


class BlockDigests:
    """Mixed into vLLM's worker; called through its development endpoint /collective_rpc."""

    def kv_block_digests(self) -> list[str]:
        """One digest for each KV block, over all layers."""
        kv_caches: list[Any] = self.model_runner.kv_caches  # type: ignore[attr-defined]
        num_blocks = self.cache_config.num_gpu_blocks  # type: ignore[attr-defined]
        digests = []
        for block in range(num_blocks):
            digest = hashlib.blake2b(digest_size=8)
            for layer in kv_caches:
                axis = list(layer.shape).index(num_blocks)
                digest.update(layer.select(axis, block).contiguous().float().numpy().tobytes())
            digests.append(digest.hexdigest())
        return digests
