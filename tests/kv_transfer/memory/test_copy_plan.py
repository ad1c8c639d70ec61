"""What is planned is carried out with plain copies between two engines' caches, and compared element by element.

Where an element lies is worked out here by reshaping the numbers of all elements, which knows nothing of planes.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kv_transfer.errors import HandOffError, PeerRefusedError
from kv_transfer.memory.copy_plan import CopyPlan, plan_copies
from kv_transfer.memory.layout import LayerFormat, first_head, rank_layout
from kv_transfer.memory.regions import Spans, memory_of
from kv_transfer.protocol import RankLayout

STRIDE_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
CONTENT = 32  # elements of a token and head: K and V, or a latent
UNTOUCHED = -1

Tables = Sequence[Sequence[int]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """An engine's KV cache: how it is split among ranks, and how each rank keeps its part."""

    num_layers: int = 2
    num_heads: int = 4  # of the model
    is_latent: bool = False  # one head, on every rank
    tp_size: int = 1
    pp_size: int = 1
    block_sizes: tuple[int, ...] = (16,)  # of each group; layer i is of group i % number of groups
    split: int = 1  # kernel blocks in a block
    num_blocks: int = 12
    kind: str = "plain"
    stride_order: str = "LBHNC"

    def layers(self, rank: int) -> range:
        per_stage = -(-self.num_layers // self.pp_size)
        first = rank // self.tp_size * per_stage
        return range(first, min(first + per_stage, self.num_layers))

    def heads(self, rank: int) -> list[int]:
        """The model's KV heads on a rank, said in another way than `first_head` says it."""
        if self.is_latent:
            return [0]
        copies = max(1, self.tp_size // self.num_heads)
        one_after_the_other = [head for head in range(self.num_heads) for _ in range(copies)]
        here = max(1, self.num_heads // self.tp_size)
        tp_rank = rank % self.tp_size
        return one_after_the_other[tp_rank * here : (tp_rank + 1) * here]

    def group(self, layer: int) -> int:
        return layer % len(self.block_sizes)

    @cached_property
    def ranks(self) -> "list[Rank]":
        return [Rank(self, rank) for rank in range(self.tp_size * self.pp_size)]

    @property
    def layouts(self) -> list[RankLayout]:
        return [rank.layout for rank in self.ranks]

    def fill(self, tables: Tables) -> None:
        """Every token of every block of a prompt, at every rank."""
        for rank in self.ranks:
            for layer in self.layers(rank.rank):
                table, block_size = tables[self.group(layer)], self.block_sizes[self.group(layer)]
                for index, block in enumerate(table):
                    if block != 0:
                        tokens = np.arange(index * block_size, (index + 1) * block_size)
                        rank.elements[rank.places[layer][block]] = rank.values(layer, tokens)


class Rank:
    """One worker's memory. `places[layer]`, [block, token of the block, head, content], are indices of `elements`."""

    def __init__(self, cache: Cache, rank: int) -> None:
        self.cache, self.rank = cache, rank
        self.places: dict[int, Ints] = {}
        num_heads = len(cache.heads(rank))
        sizes = [
            len(self._of_group(group)) * cache.num_blocks * size * num_heads * CONTENT
            for group, size in enumerate(cache.block_sizes)
        ]
        storage = torch.full((sum(sizes),), UNTOUCHED, dtype=torch.int16 if cache.kind == "amx" else torch.int32)
        self.elements = storage.numpy()
        tensors: dict[str, torch.Tensor | tuple[torch.Tensor, ...]] = {}
        numbers = torch.arange(len(storage))
        for group, of_group in enumerate(storage.split(sizes)):
            layers = self._of_group(group)
            indices = self._views(numbers.split(sizes)[group], group)
            for i, (layer, views) in enumerate(zip(layers, self._views(of_group, group), strict=True)):
                tensors[f"model.layers.{layer}.attn"] = (
                    tuple(t.transpose(1, 2) for t in views) if cache.kind == "tuple" else views[0]
                )
                self.places[layer] = self._places(indices[i], cache.block_sizes[group])
        tp_rank = rank % cache.tp_size
        head = 0 if cache.is_latent else first_head(num_heads, cache.num_heads, tp_rank, cache.tp_size)
        order = {"columns": "CPU columns", "amx": "CPU AMX tiles"}.get(cache.kind, "by token")
        self.layout = rank_layout(
            tensors,
            memory_of(tensors),
            num_blocks=cache.num_blocks,
            block_sizes=cache.block_sizes,
            formats={
                f"model.layers.{layer}.attn": LayerFormat(
                    group=cache.group(layer), num_heads=num_heads, first_head=head, order=order
                )
                for layer in cache.layers(rank)
            },
        )

    def values(self, layer: int, tokens: Ints) -> Ints:
        """What the elements of some tokens are, [token, head, content]: no two alike, but for 16 bits' sake."""
        layer_head = layer * self.cache.num_heads + np.array(self.cache.heads(self.rank))
        values = (layer_head[:, None] * 1024 + tokens[:, None, None]) * CONTENT + np.arange(CONTENT)
        return values % 32749 if self.cache.kind == "amx" else values

    def _of_group(self, group: int) -> list[int]:
        return [layer for layer in self.cache.layers(self.rank) if self.cache.group(layer) == group]

    def _views(self, flat: torch.Tensor, group: int) -> list[list[torch.Tensor]]:
        """For each layer of a group, [B, H, N, C] views in the order of strides; two for a tuple."""
        cache, layers = self.cache, self._of_group(group)
        sizes = {
            "L": len(layers),
            "B": cache.num_blocks * cache.split,
            "H": len(cache.heads(self.rank)),
            "N": cache.block_sizes[group] // cache.split,
        }
        contents = (CONTENT - 8, 8) if cache.kind == "tuple" else (CONTENT,)
        parts = flat.split([len(flat) // CONTENT * content for content in contents])
        views = []
        for part, content in zip(parts, contents, strict=True):
            stored = part.view([(sizes | {"C": content})[axis] for axis in cache.stride_order])
            views.append(stored.permute([cache.stride_order.index(axis) for axis in "LBHNC"]))
        return [[view[i] for view in views] for i in range(len(layers))]

    def _places(self, views: list[torch.Tensor], block_size: int) -> Ints:
        """From the indices that a layer's views hold: where each block, token, head and element is."""
        if self.cache.kind in ("columns", "amx"):
            num_blocks, num_heads, num_tokens, _ = views[0].shape
            k, v = views[0].reshape(num_blocks, num_heads, -1).chunk(2, dim=2)
            dim = CONTENT // 2
            if self.cache.kind == "columns":
                k = k.view(num_blocks, num_heads, dim, num_tokens).transpose(2, 3)
            else:
                k = k.view(num_blocks, num_heads, num_tokens // 16, dim // 2, 16, 2).transpose(3, 4)
                v = v.view(num_blocks, num_heads, dim // 16, num_tokens // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
            views = [t.reshape(num_blocks, num_heads, num_tokens, dim) for t in (k, v)]
        by_token = torch.cat(views, dim=3).transpose(1, 2)  # [B, N, H, C]
        return by_token.reshape(self.cache.num_blocks, block_size, *by_token.shape[2:]).numpy()


def carry_out(spans: Spans, source: Rank, target: Rank) -> None:
    theirs, ours = source.elements.view(np.uint8), target.elements.view(np.uint8)
    for remote, local, size in zip(spans.remote.tolist(), spans.local.tolist(), spans.sizes.tolist(), strict=True):
        assert (ours[local : local + size] == 255).all()  # `UNTOUCHED`: nothing is read twice
        ours[local : local + size] = theirs[remote : remote + size]


def read(plans: Sequence[CopyPlan], prefill: Cache, target: Rank, *args: object, **kwargs: object) -> None:
    for plan in plans:
        carry_out(plan.spans(*args, **kwargs), prefill.ranks[plan.source], target)  # type: ignore[arg-type]


def expected(target: Rank, tables: Tables, cells: Sequence[int], first_token: int, end_token: int) -> Ints:
    """The target's elements after it has read the tokens, whole cells of them, into untouched memory."""
    elements = np.full_like(target.elements, UNTOUCHED)
    for layer, places in target.places.items():
        group = target.cache.group(layer)
        block_size, cell = target.cache.block_sizes[group], cells[group]
        tokens = np.arange(first_token // cell * cell, -(-end_token // cell) * cell)
        blocks = np.array(tables[group])[tokens // block_size]
        kept = blocks != 0
        elements[places[blocks[kept], tokens[kept] % block_size]] = target.values(layer, tokens[kept])
    return elements


def some_tables(cache: Cache, num_tokens: int, rng: random.Random) -> list[list[int]]:
    return [rng.sample(range(1, cache.num_blocks), -(-num_tokens // size)) for size in cache.block_sizes]


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
