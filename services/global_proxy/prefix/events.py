"""vLLM's KV events as they come over the wire: which blocks the prefix cache of an engine gained and lost.

A batch is a msgpack array [time, events, data-parallel rank]; an event is a map with its class's name under "type". The
fields are those of vllm/distributed/kv_events.py that an index needs (vLLM 0.32). Fields, trailing elements and
events that are not known here are passed over: later releases add some.
"""

from typing import Annotated, Any

import msgspec

from services.global_proxy.prefix.errors import MalformedEventError

MAX_BATCH_BYTES = 32 << 20  # a million tokens take 5 MB at most, their hashes a good deal less
MEDIUM_GPU = "GPU"  # vLLM's word for the engine's own KV memory, on a CPU too

BlockHash = bytes | int  # vLLM's own, opaque here; integers with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES
TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]


class BlockStored(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Full blocks of one sequence, in its order, were added to the prefix cache."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None  # of the block before the first; None: they begin the sequence
    token_ids: list[TokenId]  # of all the blocks
    block_size: Annotated[int, msgspec.Meta(ge=1)]  # tokens
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None  # for each block what else it depends on: LoRA, images, salt
    group_idx: int | None = None  # KV cache group: layers with a block table of their own
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Blocks left the prefix cache. vLLM may hold copies of a block; each is stored and removed by itself."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The prefix cache is empty."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[KvEvent]


class _RawBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]


class _AnyEvent(msgspec.Struct, gc=False):
    type: str


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_raw_batch = msgspec.msgpack.Decoder(_RawBatch).decode
_decode_event: msgspec.msgpack.Decoder[KvEvent] = msgspec.msgpack.Decoder(KvEvent)
_decode_type = msgspec.msgpack.Decoder(_AnyEvent).decode
_KNOWN = frozenset(kind.__name__ for kind in (BlockStored, BlockRemoved, AllBlocksCleared))


def decode_batch(payload: bytes) -> list[KvEvent]:
    """The events of a batch, in their order.

    Raises:
        MalformedEventError: it is too large, no msgpack, or an event that should be known is not what it should be.
    """
    if len(payload) > MAX_BATCH_BYTES:
        raise MalformedEventError(f"a batch of {len(payload)} bytes, more than {MAX_BATCH_BYTES}")
    try:
        return _decode_batch(payload).events
    except msgspec.DecodeError:  # ValidationError is one: perhaps only an event of a later release
        pass
    try:
        raw_events = _decode_raw_batch(payload).events
        return [_decode_event.decode(raw) for raw in raw_events if _decode_type(raw).type in _KNOWN]
    except msgspec.DecodeError as error:
        raise MalformedEventError(f"no batch of vLLM's KV events: {error}") from None
