"""What is read: how many bytes, in one run or in blocks that lie apart."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.memory.regions import Spans

BLOCK_BYTES = 32 << 10  # one KV block of one layer of a small model
BUFFER_BYTES = 64 << 20  # on either side
NUM_BLOCKS = BUFFER_BYTES // BLOCK_BYTES


@dataclass(frozen=True)
class Case:
    num_bytes: int
    scattered: bool  # in blocks of BLOCK_BYTES, no two neighbours on either side; otherwise one run of bytes
    num_reads: int  # in each round

    @property
    def shape(self) -> str:
        return "scattered" if self.scattered else "contiguous"


_NUM_READS = {32 << 10: 60, 256 << 10: 40, 1 << 20: 24, 8 << 20: 6, 64 << 20: 3}  # so that each takes about as long
CASES = tuple(  # of one size, one after the other
    Case(num_bytes, scattered, num_reads)
    for num_bytes, num_reads in _NUM_READS.items()
    for scattered in (False, True)
    if not scattered or num_bytes > BLOCK_BYTES
)
QUICK_CASES = tuple(case for case in CASES if case.num_bytes in (32 << 10, 1 << 20, 64 << 20))


def spans_of(case: Case, index: int) -> Spans:
    """The spans of the case's read number `index`: reads walk through the whole buffer, so that none finds its bytes
    in a cache that the one before has filled."""
    num_blocks = case.num_bytes // BLOCK_BYTES
    start = index % (NUM_BLOCKS // num_blocks) * num_blocks
    if case.scattered:
        remote, local = (blocks[start : start + num_blocks] * BLOCK_BYTES for blocks in (_REMOTE_BLOCKS, _LOCAL_BLOCKS))
        return Spans(remote, local, np.full(num_blocks, BLOCK_BYTES, np.int64))
    offset = np.array([start * BLOCK_BYTES], np.int64)
    return Spans(offset, offset, np.array([case.num_bytes], np.int64))


def _shuffled_blocks(random: np.random.Generator) -> npt.NDArray[np.int64]:
    """All blocks, none followed by its neighbour."""
    while True:
        blocks = random.permutation(NUM_BLOCKS)
        if not (np.abs(np.diff(blocks)) == 1).any():
            return blocks


_random = np.random.default_rng(20261121)
_REMOTE_BLOCKS = _shuffled_blocks(_random)
_LOCAL_BLOCKS = _shuffled_blocks(_random)
