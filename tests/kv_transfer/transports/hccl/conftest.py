"""Two real processes and a real group; on the CPU with gloo, and once more, where there is torch_npu, with HCCL."""

from collections.abc import Iterator

import pytest

from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.hccl.side import Side
from tests.kv_transfer.transports.prefill_rank import D_SEED, PrefillRank


@pytest.fixture(scope="package", autouse=True)
def device() -> None:
    prefill_rank.load_device()


@pytest.fixture
def decode() -> Iterator[Side]:
    side = Side(D_SEED)
    yield side
    side.close()


@pytest.fixture
def checking() -> Iterator[Side]:
    side = Side(D_SEED, checksum=True)
    yield side
    side.close()


@pytest.fixture(scope="package")
def prefill() -> Iterator[PrefillRank]:
    with prefill_rank.prefill_rank("hccl") as rank:
        yield rank
