from typing import Any

import msgspec
import pytest

from services.global_proxy.prefix import events
from services.global_proxy.prefix.errors import MalformedEventError
from services.global_proxy.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch

# As vLLM 0.32 sends it: every field without a default, and those with another value than theirs.
STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [b"\1" * 32, 2**64 - 1],
    "parent_block_hash": None,
    "token_ids": [0, 5, 2**32 - 1, 7],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [None, ["salt"]],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [b"\1" * 32], "medium": "GPU", "group_idx": 0}
CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any, more: tuple[Any, ...] = (0,)) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), *more])


def test_all_events() -> None:
    assert decode_batch(batch(STORED, REMOVED, CLEARED)) == [
        BlockStored(
            [b"\1" * 32, 2**64 - 1],
            None,
            [0, 5, 2**32 - 1, 7],
            2,
            "GPU",
            extra_keys=[None, ["salt"]],
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        ),
        BlockRemoved([b"\1" * 32], "GPU", 0),
        AllBlocksCleared(),
    ]


def test_what_a_later_release_may_add_is_passed_over() -> None:
    unknown = {"type": "BlockPinned", "block_hashes": "anything"}
    payload = batch({**REMOVED, "colour": {"deep": [1]}}, unknown, CLEARED, more=(0, "more", {}))
    assert decode_batch(payload) == [BlockRemoved([b"\1" * 32], "GPU", 0), AllBlocksCleared()]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode({"events": []}),
        batch({**STORED, "token_ids": [-1, 0, 0, 0]}),
        batch({**STORED, "token_ids": [2**32, 0, 0, 0]}),
        batch({**STORED, "block_size": 0}),
        batch({**REMOVED, "block_hashes": [None]}),
        batch({"block_hashes": []}),
    ],
)
def test_nonsense_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedEventError):
        decode_batch(payload)


def test_a_batch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = batch(STORED)
    monkeypatch.setattr(events, "MAX_BATCH_BYTES", len(payload))
    decode_batch(payload)
    monkeypatch.setattr(events, "MAX_BATCH_BYTES", len(payload) - 1)
    with pytest.raises(MalformedEventError, match="bytes"):
        decode_batch(payload)
