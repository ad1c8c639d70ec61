"""Bytes land where they belong; what cannot be read is refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kv_transfer.errors import PeerRefusedError
from kv_transfer.memory.regions import Spans
from kv_transfer.protocol import HcclOffer, JoinGroup, RankEndpoint, TcpOffer
from kv_transfer.transports import hccl
from kv_transfer.transports.hccl import HcclTransport
from tests.kv_transfer.rank_peers import soon
from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.hccl.side import ALL, OFFER, ONE, Side, read
from tests.kv_transfer.transports.prefill_rank import (
    D_SEED,
    DEVICE,
    REGION_BYTES,
    PrefillRank,
    bytes_of,
    landed,
    make_spans,
)

NUM_BYTES = sum(REGION_BYTES)


def small_spans() -> Spans:
    """64 bytes each, scattered over the second region and over the third."""
    rng = np.random.default_rng(3)
    second, third = (rng.permutation(num_bytes // 64) * 64 for num_bytes in REGION_BYTES[1:])
    places = np.concatenate((REGION_BYTES[0] + second[:3000], sum(REGION_BYTES[:2]) + third[:6000]))
    others = np.concatenate((REGION_BYTES[0] + second[-3000:], sum(REGION_BYTES[:2]) + third[-6000:]))
    assert len(np.unique(others)) == len(others)
    return Spans(places, others, np.full(len(places), 64))


@pytest.mark.parametrize("spans", [ONE, ALL, small_spans()], ids=["one", "everything, in several pieces", "small"])
def test_bytes_land_exactly(prefill: PrefillRank, decode: Side, checking: Side, spans: Spans) -> None:
    for side in (decode, checking):
        read(side, prefill, spans)
        read(side, prefill, spans)  # in the same group
        assert np.array_equal(bytes_of(side.memory), landed(spans))


def test_nothing_to_read(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, make_spans([], [], []))
    assert np.array_equal(bytes_of(decode.memory), prefill_rank.content(D_SEED))


def test_many_threads_read_at_once(prefill: PrefillRank, decode: Side) -> None:
    sizes = [64 << 10] * 16
    places = [i * (1 << 20) for i in range(16)]
    spans = [make_spans([place], [place + 1000], [size]) for place, size in zip(places, sizes, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, decode, prefill, one) for one in spans]:
            done.result()
    whole = make_spans(places, [place + 1000 for place in places], sizes)
    assert np.array_equal(bytes_of(decode.memory), landed(whole))
    assert len(decode.transport._groups) == 1


def test_who_can_read_what(decode: Side) -> None:
    peer = RankEndpoint("127.0.0.1", 1, "run")
    assert decode.offer == OFFER
    assert decode.transport.can_read(peer, OFFER)
    assert not decode.transport.can_read(peer, HcclOffer("gloo" if DEVICE == "npu" else "hccl"))
    assert not decode.transport.can_read(peer, TcpOffer())
    assert HcclTransport(decode.memory, None, decode.client).offer() is None


@pytest.mark.parametrize("place", [-1, NUM_BYTES, REGION_BYTES[0] - 1, 1 << 61])
def test_spans_that_do_not_exist_are_refused_by_p(prefill: PrefillRank, decode: Side, place: int) -> None:
    before = bytes_of(decode.memory)
    with pytest.raises(PeerRefusedError, match="span"):
        read(decode, prefill, make_spans([0, place], [0, 100], [2, 2]))
    assert np.array_equal(bytes_of(decode.memory), before)
    read(decode, prefill, ONE)  # P goes on serving


def test_spans_of_ours_that_do_not_exist_are_refused_here(decode: Side) -> None:
    with pytest.raises(IndexError):
        decode.transport.read(RankEndpoint("127.0.0.1", 1, "run"), OFFER, make_spans([0], [NUM_BYTES], [1]), soon())


def test_pieces_that_are_too_large_are_refused_by_p(
    prefill: PrefillRank, decode: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hccl, "_PIECE_BYTES", 17 << 20)
    with pytest.raises(PeerRefusedError, match="at most"):
        read(decode, prefill, ALL)


def test_an_earlier_run_and_another_backend_are_refused(prefill: PrefillRank, decode: Side) -> None:
    stale = RankEndpoint(prefill.endpoint.host, prefill.endpoint.port, "an earlier run")
    with pytest.raises(PeerRefusedError, match="restarted"):
        decode.transport.read(stale, OFFER, ONE, soon())
    with decode.client.connection(prefill.endpoint, soon()) as connection:
        connection.send(JoinGroup("carrier pigeons"), soon())
        with pytest.raises(PeerRefusedError, match="not carrier pigeons"):
            connection.receive_reply(soon())
