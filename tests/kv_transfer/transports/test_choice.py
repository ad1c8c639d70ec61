"""Which transports a worker makes, offers and reads with; real ones, both sides in this process."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from kv_transfer.errors import PeerRefusedError
from kv_transfer.memory.regions import Memory, memory_of
from kv_transfer.memory.shared_pool import SharedPool
from kv_transfer.protocol import (
    HcclOffer,
    Offer,
    ProcessVmOffer,
    RankEndpoint,
    RankInfo,
    RankLayout,
    SharedMemoryOffer,
    TcpOffer,
)
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.choice import ON_DEVICE, ON_HOST, Transports
from tests.kv_transfer.rank_peers import KEY
from tests.kv_transfer.with_vllm import settings

SHARED_BYTES = 1 << 20


def memory_in(pool: SharedPool) -> Memory:
    with pool.allocating():
        return memory_of({"layer": torch.zeros(SHARED_BYTES, dtype=torch.uint8)})


def rank_of(*offers: Offer) -> RankInfo:
    layout = RankLayout(block_sizes=(16,), layers=())
    return RankInfo(endpoint=RankEndpoint("127.0.0.1", 1, "run"), layout=layout, offers=offers)


class Worker:
    def __init__(self, memory: Memory | None = None, *, serves: bool = True, **changes: Any) -> None:
        self.pool = SharedPool()
        self.memory = memory or memory_in(self.pool)
        self.server = RankServer("127.0.0.1", KEY) if serves else None
        self.client = RankClient(KEY)
        self.transports = Transports(settings(**changes), self.memory, self.pool, self.server, self.client)

    @property
    def names(self) -> list[str]:
        return list(self.transports._transports)

    def close(self) -> None:
        self.transports.close()
        self.client.close()
        if self.server is not None:
            self.server.close()
        self.pool.close()


@pytest.fixture
def prefill() -> Iterator[Worker]:
    with contextlib.closing(Worker()) as worker:
        yield worker


@pytest.fixture
def decode() -> Iterator[Worker]:
    with contextlib.closing(Worker(serves=False)) as worker:
        yield worker


def offers_of(worker: Worker) -> dict[type[Any], Offer]:
    return {type(offer): offer for offer in worker.transports.offers()}


def test_all_that_the_host_has_are_offered_best_first(prefill: Worker) -> None:
    assert prefill.names == list(ON_HOST)
    assert list(offers_of(prefill)) == [SharedMemoryOffer, ProcessVmOffer, TcpOffer]


def test_memory_that_is_not_shared_is_not_offered_as_such() -> None:
    own = memory_of({"layer": torch.zeros(64, dtype=torch.uint8)})
    with contextlib.closing(Worker(own)) as worker:
        assert list(offers_of(worker)) == [ProcessVmOffer, TcpOffer]


def test_memory_on_a_device_is_read_by_a_transport_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "is_on_host", property(lambda memory: False))
    with contextlib.closing(Worker()) as worker:
        assert worker.names == list(ON_DEVICE)


@pytest.mark.parametrize("name", ["shared_memory", "process_vm", "tcp", "hccl"])
def test_the_configured_one_alone_is_made(name: str) -> None:
    with contextlib.closing(Worker(transport=name)) as worker:
        assert worker.names == [name]


def test_the_best_of_those_offered_is_chosen(prefill: Worker, decode: Worker) -> None:
    offers = offers_of(prefill)
    for kinds, expected in (
        ((TcpOffer, ProcessVmOffer, SharedMemoryOffer), "shared_memory"),  # D's order, not P's: the last
        ((TcpOffer, ProcessVmOffer), "process_vm"),
        ((TcpOffer,), "tcp"),
    ):
        transport, offer = decode.transports.choose(rank_of(*(offers[kind] for kind in kinds)))
        assert transport.name == expected
        assert (
            offer == offers[{"shared_memory": SharedMemoryOffer, "process_vm": ProcessVmOffer}.get(expected, TcpOffer)]
        )


def test_an_offer_that_does_not_work_out_here_is_passed_over(prefill: Worker, decode: Worker) -> None:
    """Another host's: its memory is out of reach."""
    elsewhere = [msgspec.structs.replace(o, host_id="x") for o in offers_of(prefill).values() if hasattr(o, "host_id")]
    assert len(elsewhere) == 2
    transport, offer = decode.transports.choose(rank_of(*elsewhere, TcpOffer()))
    assert (transport.name, offer) == ("tcp", TcpOffer())


@pytest.mark.parametrize(
    ("ours", "offers", "message"),
    [
        ("auto", (), "127.0.0.1:1 offers nothing; this side can use shared_memory, process_vm, tcp"),
        ("auto", (HcclOffer("gloo"),), "offers hccl; this side can use"),
        ("process_vm", (TcpOffer(),), "offers tcp; this side can use process_vm"),
    ],
)
def test_without_a_common_one_the_peer_is_refused(ours: str, offers: tuple[Offer, ...], message: str) -> None:
    with contextlib.closing(Worker(serves=False, transport=ours)) as worker:
        with pytest.raises(PeerRefusedError, match=message) as refused:
            worker.transports.choose(rank_of(*offers))
        assert "set services.kv_transfer.transport to auto" in str(refused.value)


def test_settings_reach_the_transport() -> None:
    with contextlib.closing(Worker(transport="tcp", checksum=True, num_connections=3)) as worker:
        tcp: Any = worker.transports._transports["tcp"]
        assert (tcp._checksum, tcp._num_connections) == (True, 3)


def test_closing_closes_every_transport(prefill: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    for name, transport in prefill.transports._transports.items():

        def close(name: str = name, close: Callable[[], None] = transport.close) -> None:
            closed.append(name)
            close()

        monkeypatch.setattr(transport, "close", close)
    prefill.transports.close()
    assert closed == list(ON_HOST)
