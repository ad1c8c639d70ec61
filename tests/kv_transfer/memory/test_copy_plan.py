"""What is planned is carried out with plain copies between two engines' caches, and compared element by element."""

import dataclasses
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kv_transfer.errors import HandOffError, PeerRefusedError
from kv_transfer.memory.copy_plan import CopyPlan, plan_copies
from kv_transfer.protocol import RankLayout
from tests.kv_transfer.memory.caches import (
    CONTENT,
    STRIDE_ORDERS,
    UNTOUCHED,
    Cache,
    carry_out,
    expected,
    read,
    some_tables,
)

# --- any P to any D


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Cache, Cache]:
    """Caches of the same model."""
    is_latent = draw(st.booleans())
    num_heads = 1 if is_latent else draw(st.sampled_from([1, 2, 3, 4, 8]))
    model = Cache(
        num_layers=draw(st.integers(1, 4)),
        num_heads=num_heads,
        is_latent=is_latent,
        kind=draw(st.sampled_from(["plain", "tuple"] if is_latent else ["plain", "tuple", "columns", "amx"])),
    )
    num_groups = draw(st.integers(1, 2))
    tokens = draw(st.sampled_from([16, 32, 64]))

    def engine(max_tp_size: int, max_pp_size: int) -> Cache:
        sizes = [tp for tp in (1, 2, 4, 8) if tp <= max_tp_size and (num_heads % tp == 0 or tp % num_heads == 0)]
        split = draw(st.sampled_from([1, 1, 2, 4] if model.kind != "amx" else [1]))
        block_size = max(draw(st.sampled_from([16, 32, 64])), 16 * split if model.kind == "amx" else split)
        return dataclasses.replace(
            model,
            tp_size=draw(st.sampled_from(sizes)),
            pp_size=draw(st.integers(1, max_pp_size)),
            block_sizes=(block_size, tokens)[:num_groups],
            split=split,
            stride_order=draw(st.sampled_from(STRIDE_ORDERS)) if model.kind in ("plain", "tuple") else "LBHNC",
        )

    return engine(4, 3), dataclasses.replace(engine(8, 2), num_blocks=draw(st.sampled_from([9, 12, 15])))


@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(0, 99), st.integers(1, 100), st.integers(0, 1 << 30), st.booleans())
def test_every_token_arrives_where_it_belongs_and_nothing_else_is_touched(
    caches: tuple[Cache, Cache], first_token: int, end_token: int, seed: int, loses_blocks: bool
) -> None:
    prefill, decode = caches
    rng = random.Random(seed)
    tokens_per_block = [[size // c.split for size in c.block_sizes] for c in caches]
    cells = [min(sizes) for sizes in zip(*tokens_per_block, strict=True)]
    first_token = min(first_token, end_token - 1)
    tables, local_tables = some_tables(prefill, end_token, rng), some_tables(decode, end_token, rng)
    if loses_blocks and len(tables) == 2:  # an attention window: D keeps no more than P
        lost = rng.randrange(end_token)
        tables[1][: lost // prefill.block_sizes[1]] = [0] * (lost // prefill.block_sizes[1])
        lost = -(-lost // decode.block_sizes[1])
        local_tables[1][:lost] = [0] * lost
    prefill.fill(tables)
    event(f"{prefill.kind}, tp {prefill.tp_size} to {decode.tp_size}")
    for target in decode.ranks:
        plans = plan_copies(target.layout, prefill.layouts, target.rank)
        read(plans, prefill, target, tables, local_tables, first_token, end_token)
        want = expected(target, local_tables, cells, first_token, end_token)
        np.testing.assert_array_equal(target.elements, want)


def test_layers_are_read_in_parts_as_the_peer_computes_them() -> None:
    prefill = Cache(num_layers=12, pp_size=2, block_sizes=(16, 16), kind="tuple")
    decode = Cache(num_layers=12, block_sizes=(32, 32), kind="tuple")
    tables, local_tables = [[3, 9, 1, 4], [5, 6, 7, 8]], [[2, 5], [11, 1]]
    prefill.fill(tables)
    (target,) = decode.ranks
    plans = plan_copies(target.layout, prefill.layouts, 0)
    for part in (range(1), range(1, 5)):
        read(plans, prefill, target, tables, local_tables, 0, 64, layers=part)
    want = expected(target, local_tables, [16, 16], 0, 64)
    for layer in (5, 11):  # the sixth layer of each stage
        want[target.places[layer]] = UNTOUCHED
    np.testing.assert_array_equal(target.elements, want)
    read(plans, prefill, target, tables, local_tables, 0, 64, layers=range(5, 6))
    np.testing.assert_array_equal(target.elements, expected(target, local_tables, [16, 16], 0, 64))
    assert len(plans[0].spans(tables, local_tables, 0, 64, layers=range(6, 12))) == 0


def test_a_prompt_may_be_read_in_parts_as_the_peer_computes_it() -> None:
    prefill, decode = Cache(block_sizes=(32,)), Cache(block_sizes=(16,))
    tables, local_tables = [[3, 9]], [[2, 5, 7, 8]]
    prefill.fill(tables)
    (target,) = decode.ranks
    (plan,) = plan_copies(target.layout, prefill.layouts, 0)
    carry_out(plan.spans(tables, local_tables, 0, 16), prefill.ranks[0], target)
    carry_out(plan.spans(tables, local_tables, 16, 49), prefill.ranks[0], target)
    np.testing.assert_array_equal(target.elements, expected(target, local_tables, [16], 0, 64))


def test_nothing_is_asked_for() -> None:
    cache = Cache()
    (plan,) = plan_copies(cache.layouts[0], cache.layouts, 0)
    assert len(plan.spans([[]], [[]], 16, 16)) == 0


# --- who reads where


@pytest.mark.parametrize(
    ("num_heads", "prefill_tp", "decode_tp", "sources"),
    [
        (4, 1, 4, [[0], [0], [0], [0]]),
        (4, 4, 1, [[0, 1, 2, 3]]),
        (4, 4, 2, [[0, 1], [2, 3]]),
        (4, 4, 4, [[0], [1], [2], [3]]),
        (2, 4, 4, [[0], [1], [2], [3]]),  # two ranks of each hold the same head: each reads another
        (2, 8, 2, [[0], [5]]),
        (1, 4, 8, [[0], [1], [2], [3], [0], [1], [2], [3]]),
    ],
)
def test_the_readers_spread_over_the_ranks_that_hold_what_they_need(
    num_heads: int, prefill_tp: int, decode_tp: int, sources: list[list[int]]
) -> None:
    prefill, decode = Cache(num_heads=num_heads, tp_size=prefill_tp), Cache(num_heads=num_heads, tp_size=decode_tp)
    plans = [plan_copies(target.layout, prefill.layouts, target.rank) for target in decode.ranks]
    assert [[plan.source for plan in of_rank] for of_rank in plans] == sources


def test_a_latent_is_read_from_another_rank_by_each_reader() -> None:
    prefill, decode = Cache(is_latent=True, tp_size=4, pp_size=2), Cache(is_latent=True, tp_size=2)
    plans = [plan_copies(target.layout, prefill.layouts, target.rank) for target in decode.ranks]
    assert [[plan.source for plan in of_rank] for of_rank in plans] == [[0, 4], [1, 5]]


# --- as few spans as can be


@pytest.mark.parametrize("kind", ["plain", "columns", "amx"])
def test_equal_blocks_are_one_span_per_layer(kind: str) -> None:
    prefill = Cache(kind=kind, num_layers=3, block_sizes=(32,))
    (plan,) = plan_copies(prefill.layouts[0], prefill.layouts, 0)
    block_bytes = 32 * 4 * CONTENT * prefill.ranks[0].elements.itemsize
    spans = plan.spans([[1, 3, 5]], [[6, 4, 2]], 0, 96)
    assert spans.sizes.tolist() == [block_bytes] * 9
    spans = plan.spans([[1, 2, 3]], [[4, 5, 6]], 0, 96)
    assert spans.sizes.tolist() == [3 * block_bytes] * 3


def test_layers_that_lie_together_in_a_block_are_one_span() -> None:
    cache = Cache(num_layers=3, stride_order="BLHNC")
    (plan,) = plan_copies(cache.layouts[0], cache.layouts, 0)
    block_bytes = 16 * 4 * CONTENT * 4
    assert plan.spans([[1, 3]], [[6, 4]], 0, 32).sizes.tolist() == [3 * block_bytes] * 2
    assert plan.spans([[1, 3]], [[6, 4]], 0, 32, layers=range(1, 3)).sizes.tolist() == [2 * block_bytes] * 2


def test_small_blocks_in_a_row_are_one_span_of_a_large_one() -> None:
    prefill, decode = Cache(block_sizes=(64,), stride_order="LBNHC"), Cache(stride_order="LBNHC")
    (plan,) = plan_copies(decode.layouts[0], prefill.layouts, 0)
    token_bytes = 4 * CONTENT * 4
    assert plan.spans([[7]], [[3, 4, 5, 9]], 0, 64).sizes.tolist() == [48 * token_bytes, 16 * token_bytes] * 2


def test_a_head_of_many_is_a_span_for_each_block_or_for_each_token() -> None:
    decode = Cache(tp_size=4)
    for stride_order, num_spans in (("LBHNC", 2 * 3), ("LBNHC", 2 * 3 * 16)):
        prefill = Cache(stride_order=stride_order)
        (plan,) = plan_copies(decode.layouts[2], prefill.layouts, 2)
        assert len(plan.spans([[1, 2, 3]], [[4, 5, 6]], 0, 48)) == num_spans


# --- what does not fit


def changed(cache: Cache, **changes: object) -> list[RankLayout]:
    """Its layouts, the first layer of the first rank said to be other than it is."""
    first, *others = cache.layouts
    layer, *layers = first.layers
    return [msgspec.structs.replace(first, layers=(msgspec.structs.replace(layer, **changes), *layers)), *others]


def refusal(local: RankLayout, remotes: Sequence[RankLayout]) -> str:
    with pytest.raises(PeerRefusedError) as error:
        plan_copies(local, remotes, 0)
    return str(error.value)


def test_a_layer_that_is_nowhere() -> None:
    prefill = Cache(num_layers=4, pp_size=2)
    why = refusal(Cache(num_layers=4).layouts[0], prefill.layouts[:1])
    assert "KV head 0 of layer model.layers.2.attn is on none of the peer's 1 ranks" in why


def test_a_head_that_is_nowhere() -> None:
    why = refusal(Cache().layouts[0], Cache(tp_size=2).layouts[:1])
    assert "KV head 2 of layer model.layers.0.attn is on none" in why


def test_bytes_that_mean_something_else() -> None:
    why = refusal(Cache().layouts[0], changed(Cache(), encoding="float32 by token big-endian"))
    assert "layer model.layers.0.attn" in why
    assert "'int32 by token little-endian' here and as 'float32 by token big-endian' there" in why


def test_units_of_other_sizes() -> None:
    plane = Cache(kind="tuple").layouts[0].layers[0].planes[0]
    assert "of [(1, 1, 128)] here and [(1, 1, 96)] there" in refusal(
        Cache().layouts[0], changed(Cache(), planes=(plane,))
    )
    both = Cache(kind="tuple").layouts
    assert "of [(1, 1, 128)] here and [(1, 1, 96), (1, 1, 32)] there" in refusal(
        Cache().layouts[0], changed(Cache(), planes=both[0].layers[0].planes)
    )


def test_block_sizes_of_which_neither_is_a_multiple() -> None:
    why = refusal(Cache(block_sizes=(32,)).layouts[0], Cache(block_sizes=(48,)).layouts)
    assert "layer model.layers.0.attn has blocks of 32 tokens here and of 48 there" in why


# --- block tables that do not fit


@pytest.fixture(scope="module")
def plan() -> CopyPlan:
    prefill, decode = Cache(block_sizes=(32, 32), num_blocks=8, split=2), Cache(block_sizes=(16, 16))
    (plan,) = plan_copies(decode.layouts[0], prefill.layouts, 0)
    return plan


LOCAL = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("remote", "why"),
    [
        ([[1], [3, 4]], "group 0 has 1 blocks of 32 tokens, too few"),
        ([[1, 2]], "group 1 has 0 blocks of 32 tokens, too few"),
        ([], "group 0 has 0 blocks"),
        ([[1, 8], [3, 4]], "a block of group 0 is not one of 0 to 7"),
        ([[1, 2], [3, -1]], "a block of group 1 is not one of 0 to 7"),
        ([[1, 2], [0, 4]], "group 1 has given up blocks that are needed"),
    ],
)
def test_block_tables_of_the_peer_that_do_not_fit(plan: CopyPlan, remote: list[list[int]], why: str) -> None:
    with pytest.raises(HandOffError, match=why):
        plan.spans(remote, LOCAL, 0, 33)


@pytest.mark.parametrize("local", [[[1, 2, 3], [5, 6, 7, 8]], [[1, 2, 3, 12], [5, 6, 7, 8]], [[1, 2, 3, -4], []]])
def test_block_tables_of_ours_that_do_not_fit(plan: CopyPlan, local: list[list[int]]) -> None:
    with pytest.raises(IndexError, match="group 0"):
        plan.spans([[1, 2], [3, 4]], local, 0, 64)


def test_what_is_given_up_may_be_missing_outside_what_is_asked(plan: CopyPlan) -> None:
    assert len(plan.spans([[0, 2], [0, 4]], LOCAL, 32, 64)) > 0
    with pytest.raises(HandOffError, match="given up"):
        plan.spans([[0, 2], [0, 4]], LOCAL, 31, 64)


def test_nothing_is_read_into_the_null_block(plan: CopyPlan) -> None:
    everything = plan.spans([[1, 2], [3, 4]], LOCAL, 0, 64).num_bytes
    assert plan.spans([[1, 2], [0, 4]], [LOCAL[0], [0, 0, 7, 8]], 0, 64).num_bytes == everything * 3 // 4
    assert plan.spans([[0, 0], [0, 0]], [[0] * 4, [0] * 4], 0, 64).num_bytes == 0


# --- what a peer says of itself


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"group": 1}, "there is no KV cache group 1"),
        ({"planes": {"unit_tokens": 3}}, "not a whole number of units"),
        ({"planes": {"split": 5}}, "not a whole number of units"),
        ({"planes": {"num_blocks": 3, "split": 2}}, "not a whole number of units"),
        ({"planes": {"block_stride": 1 << 61}}, "ends beyond any memory"),
        ({"planes": {"unit_stride": 1 << 60}}, "ends beyond any memory"),
    ],
)
def test_a_layout_that_contradicts_itself_is_no_layout(changes: dict[str, object], why: str) -> None:
    layer = msgspec.to_builtins(Cache(num_layers=1).layouts[0])
    planes = changes.pop("planes", {})
    layer["layers"][0].update(changes)
    layer["layers"][0]["planes"][0].update(planes)
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(layer, RankLayout)


def test_planes_of_a_layer_that_differ_in_heads() -> None:
    layout = msgspec.to_builtins(Cache(kind="tuple").layouts[0])
    layout["layers"][0]["planes"][1]["num_heads"] = 3
    with pytest.raises(msgspec.ValidationError, match="its planes differ in heads"):
        msgspec.convert(layout, RankLayout)


def test_a_layout_survives_the_wire() -> None:
    layout = Cache(kind="columns", split=2).layouts[0]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=RankLayout) == layout
