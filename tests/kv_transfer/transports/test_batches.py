"""Batches are bounded, and their bytes are those of the spans, in order."""

import random

import numpy as np
import pytest

from kv_transfer.memory.regions import Spans
from kv_transfer.transports.batches import batches


def positions(spans: Spans) -> list[tuple[int, int]]:
    """Each byte's (remote, local)."""
    rows = zip(spans.remote.tolist(), spans.local.tolist(), spans.sizes.tolist(), strict=True)
    return [(remote + i, local + i) for remote, local, size in rows for i in range(size)]


@pytest.mark.parametrize("seed", range(200))
def test_every_byte_once_in_order_within_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    count, longest = rng.choice([(0, 1), (1, 300), (40, 3), (40, 100), (200, 9)])
    rows = [(rng.randrange(10**6), rng.randrange(10**6), rng.randint(1, longest)) for _ in range(count)]
    spans = Spans(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)
    max_spans, max_bytes = rng.randint(1, 20), rng.randint(1, 120)
    got = list(batches(spans, max_spans=max_spans, max_bytes=max_bytes))
    assert [byte for batch in got for byte in positions(batch)] == positions(spans)
    assert all(0 < len(batch) <= max_spans and 0 < batch.num_bytes <= max_bytes for batch in got)


def test_batches_are_as_large_as_may_be() -> None:
    spans = Spans(*[np.arange(10)] * 2, np.full(10, 4))
    assert [len(batch) for batch in batches(spans, max_spans=3, max_bytes=100)] == [3, 3, 3, 1]
    assert [len(batch) for batch in batches(spans, max_spans=100, max_bytes=16)] == [4, 4, 2]
    assert [batch.num_bytes for batch in batches(spans, max_spans=100, max_bytes=3)] == [3, 1] * 10
