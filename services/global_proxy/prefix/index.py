"""Which engines have which KV blocks in their prefix cache, as told by their events.

vLLM identifies a block by a hash over its parent's hash, its token ids and what else it depends on. Those hashes differ
from engine to engine (seed, algorithm), but an event tells the token ids too. So a block gets a key of ours, a 64-bit
hash over its parent's key and its token ids (SipHash under this process's secret), which is the same for all engines:
one table says for each key which of them have that block, one bit each. A prompt is looked up by computing its blocks'
keys from the left, once for all engines. No block needs to know its parent or children: a parent that is evicted and
comes back finds its children where they were, as it does in vLLM.
"""

from array import array
from collections.abc import Iterable

import msgspec

from services.global_proxy.prefix.events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    KvEvent,
)

MAX_BLOCKS = 1 << 18  # of one engine: some 60 MB; 4 million tokens with blocks of 16
TOKEN_BYTES = 4  # a token id is an unsigned integer of this machine's byte order

# KV that can be found from the prompt's tokens alone, at every block; None: a vLLM that does not tell.
_WHOLE_PREFIX_KINDS = (None, "full_attention", "mla_attention", "sink_full_attention")

_encode = msgspec.msgpack.Encoder().encode


class _Engine:
    """One engine's part.

    Attributes:
        block_size: tokens; 0 until its first event. Events of other sizes are about parts of blocks.
        group_idx: the KV cache group that is followed: the first of a kind that depends on the whole prefix.
        keys: our key of each block that it has, by vLLM's hash.
        num_copies: where there is more than one.
    """

    __slots__ = ("bit", "block_size", "group_idx", "keys", "name", "num_copies")

    def __init__(self, name: str, bit: int) -> None:
        self.name = name
        self.bit = bit
        self.block_size = 0
        self.group_idx: int | None = None
        self.keys: dict[BlockHash, int] = {}
        self.num_copies: dict[BlockHash, int] = {}


class KvEventIndex:
    """The prefix caches of many engines.

    An engine that is not added is unknown. What is not told is not assumed: after lost events an index has too little
    of an engine, never too much, provided that the engine was cleared.

    Attributes:
        version: changes with every change.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.version = 0
        self._max_blocks = max_blocks
        self._engines: dict[str, _Engine] = {}
        self._names: dict[int, str] = {}  # by bit
        self._holders: dict[int, int] = {}  # bits of the engines that have a block, by its key
        self._sized: dict[int, int] = {}  # bits of the engines with blocks of so many tokens

    def __contains__(self, name: str) -> bool:
        return name in self._engines

    def __len__(self) -> int:
        """Different blocks."""
        return len(self._holders)

    def num_blocks(self, name: str) -> int:
        """Different blocks that an engine has; 0 if it is unknown."""
        engine = self._engines.get(name)
        return 0 if engine is None else len(engine.keys)

    def add(self, name: str) -> None:
        """Follow an engine, from an empty cache; one that is followed already is cleared."""
        if name in self._engines:
            self.clear(name)
            return
        self.version += 1
        bit = 1
        while bit in self._names:
            bit <<= 1
        self._names[bit] = name
        self._engines[name] = _Engine(name, bit)

    def remove(self, name: str) -> None:
        """Forget an engine, if it is known."""
        if name in self._engines:
            self.clear(name)
            del self._names[self._engines.pop(name).bit]

    def clear(self, name: str) -> None:
        """Forget what an engine has, and its block size. Takes about 0.1 µs a block."""
        self.version += 1
        engine = self._engines[name]
        self._forget_blocks(engine)
        if engine.block_size:
            left = self._sized[engine.block_size] & ~engine.bit
            if left:
                self._sized[engine.block_size] = left
            else:
                del self._sized[engine.block_size]
        engine.block_size, engine.group_idx = 0, None

    def apply(self, name: str, events: Iterable[KvEvent]) -> None:
        """Note what an engine that was added tells, in its order."""
        self.version += 1
        engine = self._engines[name]
        for event in events:
            if isinstance(event, BlockStored):
                self._store(engine, event)
            elif isinstance(event, BlockRemoved):
                self._remove(engine, event)
            else:
                assert isinstance(event, AllBlocksCleared)
                self._forget_blocks(engine)

    def cached_tokens(self, token_ids: bytes, num_tokens: int | None = None) -> dict[str, int]:
        """How many tokens at the prompt's beginning each engine has cached: whole blocks. Those with none are left out.

        Args:
            token_ids: as array("I") has them. Without LoRA, images, salt: blocks that depend on such are not found.
            num_tokens: look no further; default: all but the last, which vLLM computes in any case.
        """
        if num_tokens is None:
            num_tokens = len(token_ids) // TOKEN_BYTES - 1
        found: dict[str, int] = {}
        holders = self._holders.get
        for block_size, engines in self._sized.items():
            width = block_size * TOKEN_BYTES
            end = num_tokens // block_size * width
            key, start = block_size, 0
            while start < end:
                key = hash((key, token_ids[start : start + width]))
                still = engines & holders(key, 0)
                if still != engines:
                    if start:
                        self._note(found, engines ^ still, start // TOKEN_BYTES)
                    engines = still
                    if not engines:
                        break
                start += width
            if start:
                self._note(found, engines, start // TOKEN_BYTES)
        return found

    def _note(self, found: dict[str, int], engines: int, num_tokens: int) -> None:
        names = self._names
        while engines:
            bit = engines & -engines
            found[names[bit]] = num_tokens
            engines ^= bit

    def _store(self, engine: _Engine, event: BlockStored) -> None:
        if event.medium not in (None, MEDIUM_GPU) or event.kv_cache_spec_kind not in _WHOLE_PREFIX_KINDS:
            return
        if not engine.block_size:
            engine.block_size, engine.group_idx = event.block_size, event.group_idx
            self._sized[event.block_size] = self._sized.get(event.block_size, 0) | engine.bit
        if event.block_size != engine.block_size or event.group_idx != engine.group_idx:
            return
        hashes, extra_keys = event.block_hashes, event.extra_keys
        if len(event.token_ids) != len(hashes) * event.block_size or (extra_keys and len(extra_keys) != len(hashes)):
            return
        parent = event.parent_block_hash
        key = event.block_size if parent is None else engine.keys.get(parent)
        token_ids = array("I", event.token_ids).tobytes()
        width = event.block_size * TOKEN_BYTES
        for index, block_hash in enumerate(hashes):
            known = engine.keys.get(block_hash)
            if known is not None:
                engine.num_copies[block_hash] = engine.num_copies.get(block_hash, 1) + 1
                key = known
            elif key is not None and len(engine.keys) < self._max_blocks:
                tokens = token_ids[index * width : (index + 1) * width]
                extra = extra_keys[index] if extra_keys else None
                key = hash((key, tokens)) if extra is None else hash((key, tokens, event.lora_name, _encode(extra)))
                engine.keys[block_hash] = key
                self._holders[key] = self._holders.get(key, 0) | engine.bit

    def _remove(self, engine: _Engine, event: BlockRemoved) -> None:
        if event.medium not in (None, MEDIUM_GPU) or event.group_idx != engine.group_idx:
            return
        for block_hash in event.block_hashes:
            num_copies = engine.num_copies.pop(block_hash, 1)
            if num_copies > 2:
                engine.num_copies[block_hash] = num_copies - 1
            elif num_copies == 1 and (key := engine.keys.pop(block_hash, None)) is not None:
                self._let_go(engine, key)

    def _forget_blocks(self, engine: _Engine) -> None:
        for key in engine.keys.values():
            self._let_go(engine, key)
        engine.keys.clear()
        engine.num_copies.clear()

    def _let_go(self, engine: _Engine, key: int) -> None:
        left = self._holders.get(key, 0) & ~engine.bit
        if left:
            self._holders[key] = left
        else:
            self._holders.pop(key, None)
