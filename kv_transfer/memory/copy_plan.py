"""Which bytes of which rank of P become which bytes of a rank of D.

P and D may differ in tensor- and pipeline-parallel size, in block size (one a multiple of the other) and in the order
of a cache's axes. They must agree in the units, the smallest runs of bytes (see `Plane`), and in what these mean.

A plan is made once for each pair of workers. Both sides' blocks are cut into **cells** of as many tokens as the smaller
block has, so that a cell lies within one block on either side. Which bytes a cell has there, counted from where its
block begins, is worked out once, as runs that are as long as can be. For a request, numpy adds its blocks' offsets.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.errors import HandOffError, PeerRefusedError
from kv_transfer.memory.blocks import NULL_BLOCK, BlockTables
from kv_transfer.memory.regions import Offsets, Spans
from kv_transfer.protocol import LayerLayout, Plane, RankLayout

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Side:
    """How P or D cuts a prompt into blocks and cells. Strides in bytes."""

    group: int
    block_size: int  # tokens in a block of the block table
    num_blocks: int  # of the block table's kind
    block_tokens: int  # tokens in a block of the plane
    block_stride: int  # of the plane's blocks
    cell_tokens: int
    cell_stride: int

    def locate(self, tables: BlockTables, tokens: Offsets) -> tuple[Offsets, Offsets]:
        """The blocks of the block table in which cells lie, and the offsets that this adds to their runs.

        Args:
            tokens: the first of each cell, ascending.

        Raises:
            IndexError: the table has no block for some of them, or one that is out of range.
        """
        index, token_in_block = np.divmod(tokens, self.block_size)
        first = int(index[0])
        table = tables[self.group] if self.group < len(tables) else ()
        used = np.array(table[first : int(index[-1]) + 1], dtype=np.int64)
        if len(used) <= index[-1] - first:
            raise IndexError(f"group {self.group} has {len(table)} blocks of {self.block_size} tokens, too few")
        if int(used.min()) < 0 or int(used.max()) >= self.num_blocks:
            raise IndexError(f"a block of group {self.group} is not one of 0 to {self.num_blocks - 1}")
        block_ids = used[index - first]
        block_in_block, token_in_block = np.divmod(token_in_block, self.block_tokens)
        blocks = block_ids * (self.block_size // self.block_tokens) + block_in_block
        return block_ids, blocks * self.block_stride + token_in_block // self.cell_tokens * self.cell_stride


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of bytes of a cell: `sizes[i]` bytes from `remote[i]` to `local[i]`, of layer `layers[i]` of P's rank.

    Sorted by layer, then by place. What is added for a cell is the same for all of them.
    """

    layers: Offsets
    remote: Offsets
    local: Offsets
    sizes: Offsets

    def sorted(self) -> "Runs":
        order = np.lexsort((self.remote, self.layers))
        return Runs(self.layers[order], self.remote[order], self.local[order], self.sizes[order])

    def of_layers(self, layers: range) -> "Runs":
        first, end = np.searchsorted(self.layers, (layers.start, layers.stop))
        return Runs(self.layers[first:end], self.remote[first:end], self.local[first:end], self.sizes[first:end])

    def merged(self) -> "Runs":
        """Neighbours that touch on both sides made one; its layer is the first's."""
        if len(self.sizes) == 0:
            return self
        first = np.flatnonzero(np.concatenate(((True,), ~_touch(self.remote, self.local, self.sizes))))
        return Runs(self.layers[first], self.remote[first], self.local[first], np.add.reduceat(self.sizes, first))


@dataclass(frozen=True, eq=False)
class Cells:
    """The runs of all layers that both sides cut alike."""

    remote: Side
    local: Side
    runs: Runs
    merged: Runs  # the same, made as long as can be

    def spans(
        self, remote_tables: BlockTables, local_tables: BlockTables, first_token: int, end_token: int, runs: Runs
    ) -> Spans:
        """`runs`, for each cell that has some of the tokens. Raises like `CopyPlan.spans`."""
        cell_tokens = self.local.cell_tokens
        tokens = np.arange(first_token // cell_tokens * cell_tokens, end_token, cell_tokens)
        local_blocks, local_starts = self.local.locate(local_tables, tokens)
        try:
            remote_blocks, remote_starts = self.remote.locate(remote_tables, tokens)
        except IndexError as error:
            raise HandOffError(f"kv_transfer_params: remote_block_ids: {error}") from None
        wanted = local_blocks != NULL_BLOCK
        if (remote_blocks[wanted] == NULL_BLOCK).any():
            raise HandOffError(
                f"kv_transfer_params: remote_block_ids: group {self.remote.group} has given up blocks that are needed"
            )
        if not wanted.all():
            local_starts, remote_starts = local_starts[wanted], remote_starts[wanted]
        remote = np.add.outer(runs.remote, remote_starts).ravel()
        local = np.add.outer(runs.local, local_starts).ravel()
        sizes = np.repeat(runs.sizes, len(remote_starts))
        local_steps = np.diff(local_starts)
        steps = local_steps[local_steps == np.diff(remote_starts)]
        if not np.isin(steps, runs.sizes).any():  # no run touches that of the next cell
            return Spans(remote, local, sizes)
        first = np.flatnonzero(np.concatenate(((True,), ~_touch(remote, local, sizes))))
        return Spans(remote[first], local[first], np.add.reduceat(sizes, first))


@dataclass(frozen=True, eq=False)
class CopyPlan:
    """What a rank of D reads of one rank of P. `source` is the index of that rank."""

    source: int
    cells: tuple[Cells, ...]

    def spans(
        self,
        remote_tables: BlockTables,
        local_tables: BlockTables,
        first_token: int,
        end_token: int,
        *,
        layers: range | None = None,
    ) -> Spans:
        """The bytes of the tokens [first_token, end_token) of a prompt.

        Whole cells are moved, so a few tokens beyond either end may come along: never as many as the smaller block
        has, and only within the blocks, of both sides, that hold tokens asked for. Behind a prompt's end P's last block
        holds anything, and D writes its own tokens there. Where D's last block goes on behind P's, it stays as it was.

        Nothing is read where D has the null block.

        Args:
            remote_tables, local_tables: for each KV cache group of P or D, the request's blocks from token 0 on.
            layers: only these, counted as in the RankLayout of P's rank. Default: all.

        Raises:
            HandOffError: P's block tables are too short or out of range, or P has the null block where D needs KV.
            IndexError: D's block tables are too short or out of range.
        """
        assert first_token >= 0
        parts = [Spans(_NOTHING, _NOTHING, _NOTHING)]
        if first_token < end_token:
            for cells in self.cells:
                runs = cells.merged if layers is None else cells.runs.of_layers(layers).merged()
                if len(runs.sizes) > 0:
                    parts.append(cells.spans(remote_tables, local_tables, first_token, end_token, runs))
        return parts[-1] if len(parts) <= 2 else _joined(parts)


def plan_copies(local: RankLayout, remotes: Sequence[RankLayout], local_rank: int) -> tuple[CopyPlan, ...]:
    """What a rank of D reads of which ranks of P: each layer and head once.

    Args:
        local: of the rank of D.
        remotes: of all ranks of P.
        local_rank: any number; where several ranks of P hold the same, it decides which of them is read.

    Raises:
        PeerRefusedError: a layer or head lies nowhere in P, or its bytes there do not fit ours; the message names it.
    """
    holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for rank, remote in enumerate(remotes):
        for index, remote_layer in enumerate(remote.layers):
            holders[remote_layer.name].append((rank, index))
    parts: dict[int, dict[tuple[Side, Side], list[Runs]]] = {}
    for layer in local.layers:
        heads_of: dict[tuple[int, int], list[int]] = defaultdict(list)
        for head in layer.heads:
            having = [(rank, i) for rank, i in holders[layer.name] if head in remotes[rank].layers[i].heads]
            if not having:
                raise PeerRefusedError(
                    f"KV head {head} of layer {layer.name} is on none of the peer's {len(remotes)} ranks:"
                    " is it another model, or another speculative decoding?"
                )
            heads_of[having[local_rank % len(having)]].append(head)
        for (rank, index), heads in heads_of.items():
            part = parts.setdefault(rank, defaultdict(list))
            for sides, runs in _layer_runs(remotes[rank], index, local, layer, heads):
                part[sides].append(runs)
    return tuple(
        CopyPlan(rank, tuple(_cells(*sides, runs) for sides, runs in parts[rank].items())) for rank in sorted(parts)
    )


def _layer_runs(
    remote: RankLayout, index: int, local: RankLayout, layer: LayerLayout, heads: Sequence[int]
) -> list[tuple[tuple[Side, Side], Runs]]:
    """The runs of some heads of one layer, for each of its planes. Raises PeerRefusedError."""
    remote_layer = remote.layers[index]
    _check_meaning(remote_layer, layer)
    remote_heads = np.array(heads) - remote_layer.first_head
    local_heads = np.array(heads) - layer.first_head
    result = []
    for theirs, ours in zip(remote_layer.planes, layer.planes, strict=True):
        block_tokens = remote.block_tokens(remote_layer, theirs), local.block_tokens(layer, ours)
        cell_tokens = min(block_tokens)
        if max(block_tokens) % cell_tokens:
            raise PeerRefusedError(
                f"layer {layer.name} has blocks of {block_tokens[1]} tokens here and of {block_tokens[0]} there:"
                " let one block size be a multiple of the other"
            )
        size, remote_runs, local_runs = _collapse(theirs, ours, cell_tokens // ours.unit_tokens)
        remote_runs = np.add.outer(theirs.offset + remote_heads * theirs.head_stride, remote_runs).ravel()
        local_runs = np.add.outer(ours.offset + local_heads * ours.head_stride, local_runs).ravel()
        sides = _side(remote, remote_layer, theirs, cell_tokens), _side(local, layer, ours, cell_tokens)
        num_runs = len(remote_runs)
        runs = Runs(np.full(num_runs, index), remote_runs, local_runs, np.full(num_runs, size))
        result.append((sides, runs))
    return result


def _check_meaning(theirs: LayerLayout, ours: LayerLayout) -> None:
    """Raises PeerRefusedError: the units of the two do not mean the same bytes."""
    if theirs.encoding != ours.encoding:
        raise PeerRefusedError(
            f"the KV of layer {ours.name} is kept as {ours.encoding!r} here and as {theirs.encoding!r} there: run both"
            " with the same element type and attention backend, on the same kind of processor"
        )
    our_units = [(p.num_rows, p.unit_tokens, p.unit_bytes) for p in ours.planes]
    their_units = [(p.num_rows, p.unit_tokens, p.unit_bytes) for p in theirs.planes]
    if their_units != our_units:
        raise PeerRefusedError(
            f"the KV of layer {ours.name} comes in units (rows, tokens, bytes) of {our_units} here and {their_units}"
            " there: run both with the same attention backend, block size and tensor-parallel size"
        )


def _collapse(theirs: Plane, ours: Plane, num_units: int) -> tuple[int, Offsets, Offsets]:
    """The runs of a cell and head: their size, and where they begin on both sides. Axes without gaps become one run."""
    size = ours.unit_bytes
    remote, local = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for count, remote_stride, local_stride in (
        (num_units, theirs.unit_stride, ours.unit_stride),
        (ours.num_rows, theirs.row_stride, ours.row_stride),
    ):
        if count == 1 or remote_stride == local_stride == size:
            size *= count
        else:
            remote = np.add.outer(np.arange(count) * remote_stride, remote).ravel()
            local = np.add.outer(np.arange(count) * local_stride, local).ravel()
    return size, remote, local


def _side(layout: RankLayout, layer: LayerLayout, plane: Plane, cell_tokens: int) -> Side:
    block_tokens = layout.block_tokens(layer, plane)
    is_whole_block = cell_tokens == block_tokens  # without a stride, planes that differ in it are still cut alike
    return Side(
        group=layer.group,
        block_size=layout.block_sizes[layer.group],
        num_blocks=plane.num_blocks // plane.split,
        block_tokens=block_tokens,
        block_stride=plane.block_stride,
        cell_tokens=cell_tokens,
        cell_stride=0 if is_whole_block else cell_tokens // plane.unit_tokens * plane.unit_stride,
    )


def _cells(remote: Side, local: Side, parts: Sequence[Runs]) -> Cells:
    runs = Runs(
        np.concatenate([part.layers for part in parts]),
        np.concatenate([part.remote for part in parts]),
        np.concatenate([part.local for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )
    runs = runs.sorted()
    return Cells(remote, local, runs, runs.merged())


def _touch(remote: Offsets, local: Offsets, sizes: Offsets) -> np.typing.NDArray[np.bool_]:
    """Of each span but the last, whether the next one goes on where it ends, on both sides."""
    in_remote, in_local = remote[:-1] + sizes[:-1] == remote[1:], local[:-1] + sizes[:-1] == local[1:]
    touch: np.typing.NDArray[np.bool_] = in_remote & in_local
    return touch


def _joined(parts: Sequence[Spans]) -> Spans:
    return Spans(
        np.concatenate([part.remote for part in parts]),
        np.concatenate([part.local for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )
