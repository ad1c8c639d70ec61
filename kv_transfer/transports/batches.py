"""Spans in batches of bounded size, so that between two of them a deadline can be looked at."""

from collections.abc import Iterator

import numpy as np

from kv_transfer.memory.regions import Spans


def batches(spans: Spans, *, max_spans: int, max_bytes: int) -> Iterator[Spans]:
    """The same bytes in the same order; a span of more than `max_bytes` is cut."""
    if 0 < len(spans) <= max_spans and spans.num_bytes <= max_bytes:
        yield spans
        return
    spans = _cut(spans, max_bytes)
    ends = np.cumsum(spans.sizes)
    start = 0
    while start < len(spans):
        num_bytes_before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, num_bytes_before + max_bytes, side="right"))
        batch = slice(start, min(stop, start + max_spans))
        yield Spans(spans.remote[batch], spans.local[batch], spans.sizes[batch])
        start = batch.stop


def _cut(spans: Spans, max_bytes: int) -> Spans:
    num_pieces = -(-spans.sizes // max_bytes)
    total = int(num_pieces.sum())
    if total == len(spans):
        return spans
    span = np.repeat(np.arange(len(spans)), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    skipped = (np.arange(total) - first[span]) * max_bytes
    sizes = np.minimum(spans.sizes[span] - skipped, max_bytes)
    return Spans(spans.remote[span] + skipped, spans.local[span] + skipped, sizes)
