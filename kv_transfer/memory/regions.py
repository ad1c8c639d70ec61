"""KV cache memory of one worker, as one run of bytes: its regions one after the other, counted by one offset.

What the bytes mean is the business of `layout`. Transports move spans of bytes and know nothing else.
"""

import bisect
import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    KVCache: TypeAlias = torch.Tensor | Sequence[torch.Tensor]

Offsets: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """`num_bytes` bytes from `address` on, in this process or on its device."""

    address: int
    num_bytes: int

    def __post_init__(self) -> None:
        assert self.num_bytes > 0

    def as_buffer(self) -> memoryview:
        """The bytes themselves, writable; for memory of this process."""
        return memoryview((ctypes.c_char * self.num_bytes).from_address(self.address)).cast("B")

    def as_array(self) -> npt.NDArray[np.uint8]:
        """Like `as_buffer`."""
        return np.frombuffer(self.as_buffer(), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class Spans:
    """What a read moves: `sizes[i]` bytes from `remote[i]` in the peer's memory to `local[i]` in ours."""

    remote: Offsets
    local: Offsets
    sizes: Offsets

    def __post_init__(self) -> None:
        assert len(self.remote) == len(self.local) == len(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


class Memory:
    """The regions of one worker's KV cache.

    Args:
        regions: where they lie. An offset counts through all of them, in this order.
        tensors: one flat uint8 tensor per region over the same bytes, for transports that move tensors; none needed
            for memory that is only read by address.
    """

    def __init__(self, regions: Sequence[Region], tensors: "Sequence[torch.Tensor]" = ()) -> None:
        assert not tensors or len(tensors) == len(regions)
        self.regions = tuple(regions)
        self.tensors = tuple(tensors)
        self.starts = (0, *accumulate(region.num_bytes for region in regions))

    @property
    def num_bytes(self) -> int:
        return self.starts[-1]

    @property
    def is_on_host(self) -> bool:
        return all(tensor.device.type == "cpu" for tensor in self.tensors)

    def offset_of(self, address: int) -> int:
        """The offset of an address inside one of the regions."""
        for region, start in zip(self.regions, self.starts, strict=False):
            if region.address <= address < region.address + region.num_bytes:
                return start + address - region.address
        raise AssertionError(f"address {address:#x} is in no region")

    def check(self, offsets: Offsets, sizes: Offsets) -> None:
        """Raises IndexError: a span does not lie within one region."""
        if len(sizes) == 0:
            return
        if int(sizes.min()) <= 0 or int(offsets.min()) < 0 or int(offsets.max()) >= self.num_bytes:
            raise IndexError(f"a span lies outside the memory of {self.num_bytes} bytes")
        ends = self.num_bytes if len(self.regions) == 1 else self._ends[self._region_of(offsets)]
        if bool((sizes > ends - offsets).any()):
            raise IndexError("a span reaches over the end of its region")

    def addresses(self, offsets: Offsets) -> Offsets:
        """The address of each offset, in this process or on its device."""
        if len(self.regions) == 1:
            return offsets + self.regions[0].address
        addresses: Offsets = offsets + self._bases[self._region_of(offsets)]
        return addresses

    def views(self, offsets: Offsets, sizes: Offsets) -> list[memoryview]:
        """Each span as a writable buffer; the memory is on the host. Raises IndexError like `check`."""
        assert self.is_on_host
        self.check(offsets, sizes)
        buffers = self._buffers
        if len(buffers) == 1:
            view = buffers[0]
            return [view[o : o + n] for o, n in zip(offsets.tolist(), sizes.tolist(), strict=True)]
        views = []
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            index = bisect.bisect_right(self.starts, offset) - 1
            start = offset - self.starts[index]
            views.append(buffers[index][start : start + size])
        return views

    def _region_of(self, offsets: Offsets) -> Offsets:
        index: Offsets = np.searchsorted(self._ends, offsets, side="right")
        return index

    @cached_property
    def _ends(self) -> Offsets:
        return np.array(self.starts[1:], dtype=np.int64)

    @cached_property
    def _bases(self) -> Offsets:
        """What turns an offset into an address, for each region."""
        bases = [region.address - start for region, start in zip(self.regions, self.starts, strict=False)]
        return np.array(bases, dtype=np.int64)

    @cached_property
    def _buffers(self) -> list[memoryview]:
        return [region.as_buffer() for region in self.regions]


def memory_of(kv_caches: Mapping[str, "KVCache"]) -> Memory:
    """The memory behind every layer's KV cache: one region for each storage, in the order of their addresses.

    Args:
        kv_caches: layer name → tensor, or tuple of tensors (K, V).
    """
    import torch

    flat: dict[int, torch.Tensor] = {}
    for tensor in tensors_of(kv_caches.values()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in flat:
            flat[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    addresses = sorted(flat)
    regions = [Region(address, flat[address].numel()) for address in addresses]
    return Memory(regions, [flat[address] for address in addresses])


def tensors_of(kv_caches: Iterable["KVCache"]) -> "Iterable[torch.Tensor]":
    """Every tensor of the layers' caches, tuples taken apart."""
    for kv_cache in kv_caches:
        yield from kv_cache if isinstance(kv_cache, Sequence) else (kv_cache,)
