"""Sizing KV caches."""

from omni.deployment.memory import GIB, KvNeed, engine_bytes_without_kv, kv_need, kv_sizes

from .samples import model

NEED = KvNeed(block_bytes=10, blocks_per_sequence=8)


def test_four_sequences_where_memory_allows() -> None:
    assert kv_sizes([NEED, NEED], 10_000, [100]) == [330, 330]


def test_an_equal_share_where_it_does_not() -> None:
    # 90 % of 1000 less 400 is 500: 250 each
    assert kv_sizes([NEED, NEED], 1000, [300, 100]) == [250, 250]


def test_one_sequence_at_least() -> None:
    assert kv_sizes([NEED, NEED], 10, [300]) == [90, 90]


def test_written_sizes_come_first() -> None:
    written = KvNeed(block_bytes=10, blocks_per_sequence=8, written_bytes=300)
    assert kv_sizes([written, NEED], 1000, [400]) == [300, 200]


def test_the_need_of_a_model() -> None:
    need = kv_need(model(), dtype="bfloat16", tp=1, block_size=128, max_model_len=2049, kv_cache_gib=0.5)
    assert need == KvNeed(block_bytes=128 * 23040, blocks_per_sequence=17, written_bytes=GIB // 2)
    halved = kv_need(model(num_kv_heads=4), dtype="bfloat16", tp=2, block_size=16, max_model_len=16, kv_cache_gib=None)
    assert halved.block_bytes == 16 * 2 * 30 * 4 * 64 * 2
    assert halved.written_bytes is None


def test_an_engine_s_own_bytes() -> None:
    one = engine_bytes_without_kv(model(), "bfloat16", 1)
    assert one == int(1.3 * GIB) + 270_000_000
    assert engine_bytes_without_kv(model(), "float32", 1) == one + 270_000_000
    assert engine_bytes_without_kv(model(), "bfloat16", 3) == one + 2 * int(0.4 * GIB)
