"""A peer that dies, hangs or lies, and a line that is not good."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from kv_transfer.errors import ChecksumError, DeadlineError, PeerUnreachableError, ProtocolError
from kv_transfer.protocol import (
    GroupKey,
    GroupOpen,
    GroupProof,
    PieceFollows,
    RankEndpoint,
)
from kv_transfer.rank_connection import RankConnection
from tests.kv_transfer.rank_peers import soon
from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.hccl.side import ALL, OFFER, ONE, Side, on_gloo, read
from tests.kv_transfer.transports.prefill_rank import (
    D_SEED,
    P_SEED,
    PrefillRank,
    bytes_of,
    landed,
    make_spans,
)


def test_bytes_that_changed_on_the_way_are_noticed(prefill: PrefillRank, checking: Side) -> None:
    read(checking, prefill, make_spans([], [], []))
    (group,) = checking.transport._groups
    receive = group.receive

    def receive_and_change(data: torch.Tensor, deadline: float) -> None:
        receive(data, deadline)
        changed = data.cpu()
        changed[500] ^= 1
        data.copy_(changed)

    group.receive = receive_and_change
    with pytest.raises(ChecksumError):
        read(checking, prefill, ONE)
    assert np.array_equal(bytes_of(checking.memory), prefill_rank.content(D_SEED))
    read(checking, prefill, ONE)
    assert np.array_equal(bytes_of(checking.memory), landed(ONE))


def test_who_did_not_get_the_first_message_gets_nothing(decode: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    send = RankConnection.send

    def guess(self: RankConnection, message: object, *args: object) -> None:
        send(self, GroupProof(bytes(16)) if isinstance(message, GroupProof) else message, *args)

    other = Side(P_SEED)
    try:
        monkeypatch.setattr(RankConnection, "send", guess)
        with pytest.raises(PeerUnreachableError):
            decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
    finally:
        other.close()


@on_gloo
def test_p_killed_while_it_is_read(decode: Side) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        kill_in_first_piece(decode, rank, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerUnreachableError):
            read(decode, rank, ALL)
        assert time.monotonic() < started + 10
        with pytest.raises(PeerUnreachableError):
            read(decode, rank, ONE)
    with prefill_rank.prefill_rank("hccl") as rank:  # its successor
        read(decode, rank, ONE)


@on_gloo
@pytest.mark.parametrize("is_being_read", [False, True])
def test_p_frozen_past_the_deadline(decode: Side, is_being_read: bool) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        if is_being_read:
            kill_in_first_piece(decode, rank, signal.SIGSTOP)
        else:
            read(decode, rank, ONE)
            os.kill(rank.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                read(decode, rank, ALL, started + 1.5)
            assert started + 1 < time.monotonic() < started + 6
            before = bytes_of(decode.memory)
        finally:
            os.kill(rank.process.pid, signal.SIGCONT)
        read(decode, rank, make_spans([0], [0], [1]))
        before[0] = prefill_rank.content(P_SEED)[0]
        assert np.array_equal(bytes_of(decode.memory), before)  # nothing came late


def kill_in_first_piece(side: Side, rank: PrefillRank, what: signal.Signals) -> None:
    """Send P a signal when the next piece has been asked for. Of `ALL`, that is more than sockets hold."""
    read(side, rank, ONE)
    (group,) = side.transport._groups
    receive, signals = group.receive, [what]

    def receive_after(*args: object) -> None:
        if signals:
            os.kill(rank.process.pid, signals.pop())
        receive(*args)

    group.receive = receive_after


def test_a_read_whose_turn_does_not_come_ends_by_its_deadline(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, ONE)
    with decode.transport._pair(prefill.endpoint).lock:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="other reads"):
            read(decode, prefill, ONE, started + 0.2)
        assert time.monotonic() < started + 5


def test_no_time_left(prefill: PrefillRank, decode: Side) -> None:
    with pytest.raises(DeadlineError):
        read(decode, prefill, ONE, time.monotonic() - 1)
    read(decode, prefill, ONE)
    with pytest.raises(DeadlineError):
        read(decode, prefill, ONE, time.monotonic() - 1)
    read(decode, prefill, ONE)


@pytest.mark.parametrize("kind", [GroupOpen, GroupKey, PieceFollows])
def test_what_is_no_answer_fails_the_read(decode: Side, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    send = RankConnection.send

    def lie(self: RankConnection, message: object, *args: object) -> None:
        wrong = isinstance(message, kind) and threading.current_thread().name == "kv-rank"
        send(self, PieceFollows(999) if wrong else message, *args)

    other = Side(P_SEED)
    try:
        monkeypatch.setattr(RankConnection, "send", lie)
        with pytest.raises(ProtocolError):
            decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
        assert not decode.transport._groups
    finally:
        other.close()


@on_gloo
def test_nobody_there(decode: Side) -> None:
    with pytest.raises(PeerUnreachableError):
        decode.transport.read(RankEndpoint("127.0.0.1", 1, "run"), OFFER, ONE, soon())
