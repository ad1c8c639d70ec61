"""Events as an engine would send them: vLLM's hash of a block is here its whole prefix, written out."""

from array import array
from collections.abc import Sequence
from typing import Any

from services.global_proxy.prefix.events import BlockRemoved, BlockStored


def block_hash(tokens: Sequence[int]) -> bytes:
    """Of the last block of these tokens."""
    return repr(list(tokens)).encode()


def packed(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def stored(tokens: Sequence[int], first: int = 0, block_size: int = 2, **more: Any) -> BlockStored:
    """The whole blocks of a sequence, from some block on."""
    ends = range((first + 1) * block_size, len(tokens) + 1, block_size)
    parent = block_hash(tokens[: first * block_size]) if first else None
    told = {"medium": "GPU", "group_idx": 0, "kv_cache_spec_kind": "full_attention", **more}
    within = list(tokens[first * block_size : ends[-1]])
    return BlockStored([block_hash(tokens[:end]) for end in ends], parent, within, block_size, **told)


def removed(tokens: Sequence[int], **more: Any) -> BlockRemoved:
    """The last block of these tokens."""
    return BlockRemoved([block_hash(tokens)], **{"medium": "GPU", "group_idx": 0, **more})
