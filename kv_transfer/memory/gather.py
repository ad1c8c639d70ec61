"""Many small spans of memory as one buffer, and back: for wires on which each piece costs.

A head of a token can be as little as 64 bytes where P and D differ in layout. All spans of a region are cut into units
of their greatest common size, which numpy, or the device on which the memory lies, moves without a loop in Python.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kv_transfer.memory.regions import Memory, Offsets

if TYPE_CHECKING:
    import torch

SMALL_SPAN_BYTES = 4096  # below this average it pays to gather
_UNITS_PER_LAUNCH = 4096  # starting one copy on a device costs about as much as moving so many units by their indices

Bytes = npt.NDArray[np.uint8]


def is_worth_it(sizes: Offsets) -> bool:
    return len(sizes) > 64 and int(sizes.mean()) < SMALL_SPAN_BYTES


def gather(memory: Memory, offsets: Offsets, sizes: Offsets, out: Bytes | None = None) -> Bytes:
    """The bytes of all spans of host memory, one after the other; in `out` if that is given, which they must fill.

    Raises:
        IndexError: a span lies outside the memory.
    """
    memory.check(offsets, sizes)
    gathered = np.empty(int(sizes.sum()), dtype=np.uint8) if out is None else out
    for run in _runs(memory, offsets, sizes):
        source, part = memory.regions[run.region].as_array(), gathered[run.begin : run.end]
        if run.has_large_spans:
            for start, position, size in run.copies():
                part[position : position + size] = source[start : start + size]
        else:
            units = _as_units(source, run.unit)
            # What lies outside has been refused by `check`; with mode "raise", numpy would copy twice.
            np.take(units, run.units(), out=_as_units(part, run.unit), mode="clip")
    return gathered


def scatter(memory: Memory, offsets: Offsets, sizes: Offsets, data: Bytes) -> None:
    """The reverse: write `data`, which `gather` of the peer's spans gave, to the spans. Raises IndexError likewise."""
    memory.check(offsets, sizes)
    for run in _runs(memory, offsets, sizes):
        target, part = memory.regions[run.region].as_array(), data[run.begin : run.end]
        if run.has_large_spans:
            for start, position, size in run.copies():
                target[start : start + size] = part[position : position + size]
        else:
            _as_units(target, run.unit)[run.units()] = _as_units(part, run.unit)


def gather_tensor(memory: Memory, offsets: Offsets, sizes: Offsets, out: "torch.Tensor") -> None:
    """`gather` on the device of the memory: fill `out`, flat uint8 and contiguous on that device.

    The work is put on the current stream. Raises IndexError: a span lies outside the memory.
    """
    memory.check(offsets, sizes)
    for run in _runs(memory, offsets, sizes):
        source, part = memory.tensors[run.region], out[run.begin : run.end]
        if run.is_launched_each:
            for start, position, size in run.copies():
                part[position : position + size].copy_(source[start : start + size])
        else:
            rows, part_rows = _as_rows(source, part, run.unit)
            part_rows.copy_(rows.index_select(0, _index_on(source, run)))


def scatter_tensor(memory: Memory, offsets: Offsets, sizes: Offsets, data: "torch.Tensor") -> None:
    """`scatter` on the device of the memory, on the current stream; `data` as `gather_tensor` filled it."""
    memory.check(offsets, sizes)
    for run in _runs(memory, offsets, sizes):
        target, part = memory.tensors[run.region], data[run.begin : run.end]
        if run.is_launched_each:
            for start, position, size in run.copies():
                target[start : start + size].copy_(part[position : position + size])
        else:
            rows, part_rows = _as_rows(target, part, run.unit)
            rows[_index_on(target, run)] = part_rows


@dataclass(frozen=True, eq=False)
class _Run:
    """Neighbours in the list of spans that lie in the same region."""

    region: int
    starts: Offsets  # in the region
    sizes: Offsets
    begin: int  # of the run's bytes in the gathered buffer
    end: int

    @property
    def unit(self) -> int:
        """The largest size of which all starts and sizes are multiples."""
        return int(np.gcd(np.gcd.reduce(self.starts), np.gcd.reduce(self.sizes)))

    @property
    def has_large_spans(self) -> bool:
        return self.end - self.begin >= SMALL_SPAN_BYTES * len(self.sizes)

    @property
    def is_launched_each(self) -> bool:
        return self.end - self.begin > _UNITS_PER_LAUNCH * self.unit * len(self.sizes)

    def units(self) -> Offsets:
        """The indices, in the region, of the units that the spans cover, in order."""
        unit = self.unit
        counts = self.sizes // unit
        ends = np.cumsum(counts)
        indices: Offsets = np.arange(int(ends[-1])) + np.repeat(self.starts // unit - (ends - counts), counts)
        return indices

    def copies(self) -> Iterator[tuple[int, int, int]]:
        """For each span: its start in the region, its start in the run's bytes, its size."""
        positions = np.cumsum(self.sizes) - self.sizes
        return zip(self.starts.tolist(), positions.tolist(), self.sizes.tolist(), strict=True)


def _runs(memory: Memory, offsets: Offsets, sizes: Offsets) -> Iterator[_Run]:
    if len(sizes) == 0:
        return
    regions = np.searchsorted(memory.starts, offsets, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(regions)) + 1).tolist(), len(sizes)]
    ends = np.cumsum(sizes)
    for first, last in itertools.pairwise(cuts):
        region = int(regions[first])
        starts = offsets[first:last] - memory.starts[region]
        yield _Run(region, starts, sizes[first:last], int(ends[first] - sizes[first]), int(ends[last - 1]))


def _as_units(array: Bytes, unit: int) -> npt.NDArray[np.void]:
    return array[: len(array) // unit * unit].view(np.dtype((np.void, unit)))


def _as_rows(region: "torch.Tensor", part: "torch.Tensor", unit: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Both as rows of one unit; in whole words, which a device moves faster, where unit and places allow."""
    import torch

    rows, part_rows = region[: len(region) // unit * unit].view(-1, unit), part.view(-1, unit)
    if unit % 4 or part.storage_offset() % 4 or region.storage_offset() % 4:
        return rows, part_rows
    return rows.view(torch.int32), part_rows.view(torch.int32)


def _index_on(region: "torch.Tensor", run: _Run) -> "torch.Tensor":
    import torch

    return torch.from_numpy(run.units()).to(region.device)
