"""Against bytes moved one span at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.memory import gather
from kv_transfer.memory.regions import Memory, Offsets, Region

REGION_BYTES = (4096, 1000, 20_000)  # the second is no multiple of a word


def make_memory(seed: int, last_bytes: int = REGION_BYTES[-1]) -> tuple[Memory, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for size in (*REGION_BYTES[:-1], last_bytes)
    ]
    return Memory([Region(tensor.data_ptr(), tensor.numel()) for tensor in tensors], tensors), tensors


def expected_bytes(tensors: list[torch.Tensor], offsets: Offsets, sizes: Offsets) -> bytes:
    everything = torch.cat(tensors).numpy().tobytes()
    return b"".join(everything[o : o + n] for o, n in zip(offsets.tolist(), sizes.tolist(), strict=True))


def arrays(spans: list[tuple[int, int]]) -> tuple[Offsets, Offsets]:
    offsets, sizes = zip(*spans, strict=True) if spans else ((), ())
    return np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64)


@st.composite
def disjoint_spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """In any order, aligned in any way, in all regions."""
    step = draw(st.sampled_from([1, 2, 3, 8, 64, 500]))
    size = step * draw(st.integers(1, 4))
    starts = np.cumsum((0, *REGION_BYTES))
    places = [
        int(start) + place
        for start, region_bytes in zip(starts, REGION_BYTES, strict=False)
        for place in range(0, region_bytes - size + 1, size)
    ]
    chosen = draw(st.lists(st.sampled_from(places), max_size=60, unique=True))
    shorter = draw(st.lists(st.integers(0, 3), min_size=len(chosen), max_size=len(chosen)))
    return [(place, max(size - less * step, step)) for place, less in zip(chosen, shorter, strict=True)]


@settings(deadline=None, max_examples=60)
@given(disjoint_spans())
def test_gathers_and_scatters_what_the_spans_hold(spans: list[tuple[int, int]]) -> None:
    offsets, sizes = arrays(spans)
    source, source_tensors = make_memory(1)
    expected = expected_bytes(source_tensors, offsets, sizes)
    gathered = gather.gather(source, offsets, sizes)
    assert gathered.tobytes() == expected
    out = torch.zeros(len(expected), dtype=torch.uint8)
    gather.gather_tensor(source, offsets, sizes, out)
    assert out.numpy().tobytes() == expected

    host, host_tensors = make_memory(2)
    device, device_tensors = make_memory(2)
    everything, sent = torch.cat(host_tensors), torch.cat(source_tensors)
    for offset, size in spans:
        everything[offset : offset + size] = sent[offset : offset + size]
    gather.scatter(host, offsets, sizes, gathered)
    gather.scatter_tensor(device, offsets, sizes, out)
    assert torch.equal(torch.cat(host_tensors), everything)
    assert torch.equal(torch.cat(device_tensors), everything)


@pytest.mark.parametrize(("size", "step"), [(8192, 8192), (5000, 5001), (70_001, 100_003)])
def test_large_spans(size: int, step: int) -> None:
    """These are copied one by one; the last ones have hardly a common unit, and are many units each."""
    first = sum(REGION_BYTES[:2])
    offsets, sizes = arrays([(first + i * step, size) for i in (4, 1, 7, 2)])
    source, source_tensors = make_memory(1, 1 << 20)
    target, target_tensors = make_memory(2, 1 << 20)
    out = np.empty(4 * size, dtype=np.uint8)
    assert gather.gather(source, offsets, sizes, out) is out
    assert out.tobytes() == expected_bytes(source_tensors, offsets, sizes)
    gather.scatter(target, offsets, sizes, out)
    assert expected_bytes(target_tensors, offsets, sizes) == out.tobytes()

    tensor = torch.empty(4 * size, dtype=torch.uint8)
    gather.gather_tensor(source, offsets, sizes, tensor)
    assert tensor.numpy().tobytes() == out.tobytes()
    again, again_tensors = make_memory(2, 1 << 20)
    gather.scatter_tensor(again, offsets, sizes, tensor)
    assert torch.equal(torch.cat(again_tensors), torch.cat(target_tensors))


@pytest.mark.parametrize(
    "span", [(-1, 1), (0, 0), (0, 4097), (4095, 2), (sum(REGION_BYTES), 1), (sum(REGION_BYTES) - 1, 2), (0, 1 << 62)]
)
def test_a_span_outside_the_memory_moves_nothing(span: tuple[int, int]) -> None:
    memory, tensors = make_memory(1)
    before = torch.cat(tensors)
    offsets, sizes = arrays([(0, 8), span])
    data = np.full(16, 255, dtype=np.uint8)
    for refused in (
        lambda: gather.gather(memory, offsets, sizes, data),
        lambda: gather.scatter(memory, offsets, sizes, data),
        lambda: gather.gather_tensor(memory, offsets, sizes, torch.from_numpy(data)),
        lambda: gather.scatter_tensor(memory, offsets, sizes, torch.from_numpy(data)),
    ):
        with pytest.raises(IndexError):
            refused()
    assert (data == 255).all()
    assert torch.equal(torch.cat(tensors), before)


def test_no_spans() -> None:
    memory, tensors = make_memory(1)
    before = torch.cat(tensors)
    offsets, sizes = arrays([])
    data = gather.gather(memory, offsets, sizes)
    assert len(data) == 0
    gather.scatter(memory, offsets, sizes, data)
    gather.gather_tensor(memory, offsets, sizes, torch.from_numpy(data))
    gather.scatter_tensor(memory, offsets, sizes, torch.from_numpy(data))
    assert torch.equal(torch.cat(tensors), before)


@pytest.mark.parametrize(("count", "size", "worth"), [(64, 64, False), (65, 64, True), (65, 4096, False)])
def test_when_it_is_worth_it(count: int, size: int, worth: bool) -> None:
    assert gather.is_worth_it(np.full(count, size)) == worth
