"""The KV caches of two engines whose every element is known, and the carrying out of plans between them.

Where an element lies is worked out here by reshaping the numbers of all elements, which knows nothing of planes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.memory.copy_plan import CopyPlan
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
