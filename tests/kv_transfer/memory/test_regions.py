"""Regions under one offset, and what lies in a span."""

import random

import numpy as np
import pytest
import torch

from kv_transfer.memory.regions import Memory, Offsets, Region, Spans, memory_of, tensors_of

SIZES = (100, 1, 64, 7)
TOTAL = sum(SIZES)


def offsets(*values: int) -> Offsets:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def arrays() -> "list[np.typing.NDArray[np.uint8]]":
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in SIZES]


@pytest.fixture
def memory(arrays: "list[np.typing.NDArray[np.uint8]]") -> Memory:
    return Memory([Region(array.ctypes.data, array.nbytes) for array in arrays])


# --- offsets


def test_offsets_count_through_the_regions(memory: Memory, arrays) -> None:
    assert memory.num_bytes == TOTAL
    assert memory.starts == (0, 100, 101, 165, 172)
    addresses = [array.ctypes.data + i for array in arrays for i in range(array.nbytes)]
    assert memory.addresses(np.arange(TOTAL)).tolist() == addresses
    assert [memory.offset_of(address) for address in addresses] == list(range(TOTAL))


def test_an_address_in_no_region_is_our_own_mistake() -> None:
    memory = Memory([Region(0x1000, 16), Region(0x3000, 16)])
    for address in (0, 0xFFF, 0x1010, 0x2FFF, 0x3010):
        with pytest.raises(AssertionError, match="in no region"):
            memory.offset_of(address)


def test_a_region_without_bytes_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Region(0x1000, 0)


# --- bounds


def test_exactly_the_spans_inside_one_region_pass(memory: Memory) -> None:
    region_of = [region for region, size in enumerate(SIZES) for _ in range(size)]
    for offset in range(-2, TOTAL + 2):
        for size in (-1, 0, 1, 2, 7, 64, 65, 100, TOTAL, 1 << 62):
            inside = size > 0 and offset >= 0 and offset + size <= TOTAL
            good = inside and region_of[offset] == region_of[offset + size - 1]
            try:
                memory.check(offsets(0, offset), offsets(1, size))
            except IndexError:
                assert not good, (offset, size)
            else:
                assert good, (offset, size)


def test_offsets_at_the_edge_of_what_they_can_be(memory: Memory) -> None:
    most = np.iinfo(np.int64).max
    for offset, size in [(most, 1), (most, most), (0, most), (1, most), (-most, 1)]:
        with pytest.raises(IndexError):
            memory.check(offsets(offset), offsets(size))


def test_no_spans_are_within_any_bounds(memory: Memory) -> None:
    memory.check(offsets(), offsets())
    Memory([]).check(offsets(), offsets())
    assert memory.addresses(offsets()).tolist() == []
    with pytest.raises(IndexError):
        Memory([]).check(offsets(0), offsets(1))


# --- views


@pytest.mark.parametrize("num_regions", [1, 4])
def test_views_are_the_bytes_themselves(arrays, num_regions: int) -> None:
    arrays = arrays[:num_regions]
    memory = Memory([Region(array.ctypes.data, array.nbytes) for array in arrays])
    content = np.concatenate(arrays).tobytes()
    rng = random.Random(1)
    for _ in range(200):
        rows = []
        for _ in range(rng.randint(0, 5)):
            region = rng.randrange(num_regions)
            start = rng.randrange(SIZES[region])
            rows.append((memory.starts[region] + start, rng.randint(1, SIZES[region] - start)))
        views = memory.views(offsets(*[row[0] for row in rows]), offsets(*[row[1] for row in rows]))
        assert [bytes(view) for view in views] == [content[start : start + size] for start, size in rows]
    (view,) = memory.views(offsets(10), offsets(3))
    view[:] = b"new"
    assert arrays[0][10:13].tobytes() == b"new"
    with pytest.raises(IndexError):
        memory.views(offsets(memory.num_bytes - 1), offsets(2))


# --- spans


def test_spans_have_three_columns_of_one_length() -> None:
    spans = Spans(offsets(1, 2), offsets(3, 4), offsets(5, 6))
    assert (len(spans), spans.num_bytes) == (2, 11)
    assert (len(Spans(*[offsets()] * 3)), Spans(*[offsets()] * 3).num_bytes) == (0, 0)
    for wrong in ([offsets(1), offsets(3, 4), offsets(5, 6)], [offsets(1, 2), offsets(3, 4), offsets(5)]):
        with pytest.raises(AssertionError):
            Spans(*wrong)


# --- tensors


def test_each_storage_is_one_region_whatever_views_it() -> None:
    buffer = torch.arange(200, dtype=torch.int16)
    layers = {str(i): buffer[i * 100 :].view(-1)[:50].view(5, 10).T for i in range(2)}
    memory = memory_of(layers)
    assert memory.regions == (Region(buffer.data_ptr(), 400),)
    assert memory.is_on_host
    (flat,) = memory.tensors
    assert (flat.dtype, flat.shape, flat.data_ptr()) == (torch.uint8, (400,), buffer.data_ptr())
    flat[:2] = 1
    assert int(buffer[0]) == 0x0101


def test_regions_come_in_the_order_of_their_addresses() -> None:
    tensors = [torch.zeros(10 + i, dtype=torch.uint8) for i in range(6)]
    memory = memory_of({"0": tuple(tensors[3:]), "1": tensors[2], "2": [tensors[1], tensors[0]], "3": tensors[4]})
    expected = sorted((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    assert [(region.address, region.num_bytes) for region in memory.regions] == expected
    assert [flat.data_ptr() for flat in memory.tensors] == [address for address, _ in expected]


def test_memory_keeps_its_tensors() -> None:
    memory = memory_of({"0": torch.full((1 << 20,), 7, dtype=torch.uint8)})
    (view,) = memory.views(offsets(0), offsets(1 << 20))
    assert bytes(view) == b"\x07" * (1 << 20)


def test_device_memory_is_not_on_the_host() -> None:
    assert not Memory([Region(0x1000, 8)], [torch.empty(8, dtype=torch.uint8, device="meta")]).is_on_host
    with pytest.raises(AssertionError):
        Memory([Region(0x1000, 8)], [torch.zeros(8)] * 2)


def test_tuples_of_tensors_are_taken_apart() -> None:
    a, b, c = (torch.zeros(1) for _ in range(3))
    assert [id(tensor) for tensor in tensors_of([(a, b), c, [a]])] == [id(a), id(b), id(c), id(a)]
