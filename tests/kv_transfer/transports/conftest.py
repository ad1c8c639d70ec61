"""Workers of P and D that TCP connects."""

import contextlib
from collections.abc import Iterator

import pytest

from kv_transfer.transports import tcp
from tests.kv_transfer.transports.peers import (
    D_SEED,
    P_SEED,
    Side,
)


@pytest.fixture
def prefill() -> Iterator[Side]:
    with contextlib.closing(Side(P_SEED, serves=True)) as side:
        yield side


@pytest.fixture(params=[False, True], ids=["plain", "checksum"])
def decode(request: pytest.FixtureRequest) -> Iterator[Side]:
    with contextlib.closing(Side(D_SEED, checksum=request.param)) as side:
        yield side


@pytest.fixture(params=[2, 3, 4])
def parallel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    """D with so many connections, which are all used for reads of 1 MiB and more."""
    monkeypatch.setattr(tcp, "_MIN_BYTES_PER_CONNECTION", 1 << 18)
    with contextlib.closing(Side(D_SEED, num_connections=request.param)) as side:
        yield side
