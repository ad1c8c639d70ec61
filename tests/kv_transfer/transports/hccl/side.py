"""A worker with HcclTransport, and what its tests read."""

import pytest

from kv_transfer.memory.regions import Spans
from kv_transfer.protocol import HcclOffer
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.hccl import HcclTransport
from tests.kv_transfer.rank_peers import soon
from tests.kv_transfer.transports.prefill_rank import DEVICE, KEY, REGION_BYTES, PrefillRank, make_memory, make_spans

OFFER = HcclOffer({"cpu": "gloo", "npu": "hccl"}[DEVICE])
ONE = make_spans([100], [200], [1000])
ALL = make_spans([0, REGION_BYTES[0], sum(REGION_BYTES[:2])], [0, REGION_BYTES[0], sum(REGION_BYTES[:2])], REGION_BYTES)

on_gloo = pytest.mark.skipif(DEVICE != "cpu", reason="the stand-in for HCCL does not notice that a peer is gone")


class Side:
    """A transport with all that it needs."""

    def __init__(self, seed: int, *, checksum: bool = False) -> None:
        self.memory = make_memory(seed)
        self.server = RankServer("127.0.0.1", KEY)
        self.client = RankClient(KEY)
        self.transport = HcclTransport(self.memory, self.server, self.client, checksum=checksum)
        self.offer = self.transport.offer()
        self.server.start()

    def close(self) -> None:
        self.transport.close()
        self.client.close()
        self.server.close()


def read(side: Side, rank: PrefillRank, spans: Spans, deadline: float | None = None) -> None:
    assert side.transport.can_read(rank.endpoint, rank.offer)
    side.transport.read(rank.endpoint, rank.offer, spans, soon() if deadline is None else deadline)
