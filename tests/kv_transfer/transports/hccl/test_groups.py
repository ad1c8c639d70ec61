"""A group with a peer ends with either side, and costs nothing while it idles."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.errors import PeerUnreachableError
from kv_transfer.transports.hccl import HcclTransport
from kv_transfer.transports.rank_group import RankGroup
from tests.kv_transfer.rank_peers import soon, until
from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.hccl.side import ALL, OFFER, ONE, Side, on_gloo, read
from tests.kv_transfer.transports.prefill_rank import (
    D_SEED,
    P_SEED,
    PrefillRank,
    bytes_of,
    landed,
)


def test_forgetting_a_peer_ends_its_group_on_both_sides(decode: Side) -> None:
    other = Side(P_SEED)
    try:
        decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
        assert len(other.transport._groups) == 1
        decode.transport.forget(other.server.endpoint)
        assert not decode.transport._groups
        until(lambda: not other.transport._groups, "P keeps the group")
        decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
    finally:
        other.close()


def test_a_peer_forgotten_while_it_is_read_is_left_after_that(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, ONE)
    (group,) = decode.transport._groups
    pair = decode.transport._pairs[prefill.endpoint]
    receive = group.receive

    def receive_and_forget(*args: object) -> None:
        decode.transport.forget(prefill.endpoint)
        receive(*args)

    group.receive = receive_and_forget
    read(decode, prefill, ALL)
    assert np.array_equal(bytes_of(decode.memory), landed(ALL))
    assert pair.joined is None
    assert not decode.transport._groups


def test_the_group_with_a_peer_that_is_gone_is_left(prefill: PrefillRank, decode: Side) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        read(decode, rank, ONE)
    read(decode, prefill, ONE)
    assert len(decode.transport._groups) == 1


@on_gloo
@pytest.mark.parametrize("who", ["P", "D"])
def test_closing_either_side_fails_the_read_under_way(decode: Side, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Side(P_SEED)
    sending, go_on = threading.Event(), threading.Event()
    send_piece = HcclTransport._send_piece

    def send_slowly(self: HcclTransport, connection: object, group: RankGroup, *args: object) -> None:
        send = group.send

        def slow(*args: object) -> None:
            sending.set()
            go_on.wait(10)
            send(*args)

        group.send = slow
        send_piece(self, connection, group, *args)

    monkeypatch.setattr(HcclTransport, "_send_piece", send_slowly)
    with ThreadPoolExecutor(1) as pool:
        try:
            done = pool.submit(decode.transport.read, other.server.endpoint, OFFER, ONE, soon())
            assert sending.wait(10)
            (other if who == "P" else decode).transport.close()
            assert isinstance(done.exception(timeout=10), PeerUnreachableError)
        finally:
            go_on.set()
            other.close()


@on_gloo
def test_nothing_is_left_behind() -> None:
    def cycle() -> None:
        prefill, decode = Side(P_SEED), Side(D_SEED)
        decode.transport.read(prefill.server.endpoint, OFFER, ONE, soon())
        decode.close()
        prefill.close()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    others = threading.active_count()
    cycle()
    until(lambda: threading.active_count() <= others, "threads of the first cycle")
    before = held()
    for _ in range(3):
        cycle()
    until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), f"{held()} after {before}")


def test_an_idle_group_uses_no_processor_time(decode: Side, prefill: PrefillRank) -> None:
    read(decode, prefill, ONE)
    ticks = os.sysconf("SC_CLK_TCK")

    def used_s() -> float:
        times = Path(f"/proc/{prefill.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / ticks + time.process_time()

    before = used_s()
    time.sleep(1)
    assert used_s() - before < 0.1
