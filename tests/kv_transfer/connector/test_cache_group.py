"""Groups of vLLM's own specs; and that vLLM gives up no block that `first_token_needed` says is needed."""

from typing import Any

import pytest
import torch

from kv_transfer.connector.cache_group import CacheGroup, cache_groups, first_blocks
from kv_transfer.memory.blocks import NULL_BLOCK
from tests.kv_transfer.with_vllm import BLOCK_SIZE, Engine, KVCacheConfig, cache_config, kv_cache_interface, new_request

FIELDS: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def test_groups_of_a_model_with_windows() -> None:
    assert cache_groups(cache_config(8, (None, 20))) == (CacheGroup(16, None), CacheGroup(16, 20))


def test_a_group_of_several_specs_of_one_type() -> None:
    specs = {
        "a": kv_cache_interface.SlidingWindowSpec(**FIELDS, sliding_window=24),
        "b": kv_cache_interface.SlidingWindowSpec(**FIELDS | {"head_size": 16}, sliding_window=24),
    }
    together = kv_cache_interface.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
    assert CacheGroup.of(together) == CacheGroup(16, 24)


def test_a_latent_is_attention_too() -> None:
    assert CacheGroup.of(kv_cache_interface.MLAAttentionSpec(**FIELDS)) == CacheGroup(16, None)


def test_what_is_no_attention_is_refused() -> None:
    spec = kv_cache_interface.MambaSpec(block_size=16, shapes=((1,),), dtypes=(torch.float32,))
    group = kv_cache_interface.KVCacheGroupSpec(["layer"], spec)
    with pytest.raises(ValueError, match=r"cannot hand off a MambaSpec.*Serve this model with mixed prefill"):
        cache_groups(KVCacheConfig(8, [], [group]))


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_number_of_blocks(num_tokens: int, expected: int) -> None:
    assert CacheGroup(16, None).num_blocks(num_tokens) == expected


@pytest.mark.parametrize(
    ("window", "num_tokens", "expected"), [(None, 100, 0), (20, 19, 0), (20, 20, 0), (20, 21, 1), (20, 100, 80)]
)
def test_the_first_token_that_the_last_attends_to(window: int | None, num_tokens: int, expected: int) -> None:
    assert CacheGroup(16, window).first_token_needed(num_tokens) == expected


def test_each_table_is_cut_by_its_own_block_size() -> None:
    groups = (CacheGroup(16, None), CacheGroup(32, 40))
    assert first_blocks(groups, ([1, 2, 3, 4], [5, 0, 6]), 33) == ((1, 2, 3), (5, 0))
    assert first_blocks(groups, ([1, 2, 3, 4], [5, 0, 6]), 0) == ((), ())
    assert first_blocks(groups, ([1], [5]), 100) == ((1,), (5,))
    with pytest.raises(ValueError, match="zip"):
        first_blocks(groups, ([1],), 16)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 20, 32])
def test_d_has_no_block_in_front_of_the_first_token_needed_and_all_behind(window: int) -> None:
    """D computes the last token: vLLM's own view of which blocks that takes."""
    engine = Engine("decode", windows=(window,))
    group = CacheGroup(BLOCK_SIZE, window)
    for num_tokens in range(2, 80):
        request = new_request(list(range(num_tokens)))
        blocks = engine.manager.allocate_slots(
            request, 0, num_external_computed_tokens=num_tokens - 1, delay_cache_blocks=True
        )
        assert blocks is not None
        (table,) = engine.block_ids(request)
        first = group.first_token_needed(num_tokens) // BLOCK_SIZE
        assert all(block == NULL_BLOCK for block in table[:first])
        assert NULL_BLOCK not in table[first:]
        engine.manager.free(request)
    engine.close()
