import threading

import pytest

from kv_transfer.decode.peer_backoff import PeerBackoff
from kv_transfer.errors import PeerUnreachableError

PEER, OTHER = ("p1", 9000), ("p2", 9000)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backoff(clock: Clock) -> PeerBackoff:
    return PeerBackoff(clock)


def is_left_alone(backoff: PeerBackoff, peer: tuple[str, int] = PEER) -> bool:
    try:
        backoff.check(peer)
    except PeerUnreachableError:
        return True
    return False


def test_a_peer_that_answers_is_asked_again_and_again(backoff: PeerBackoff) -> None:
    for _ in range(3):
        assert not is_left_alone(backoff)
        backoff.answered(PEER)
    assert len(backoff) == 0


def test_pauses_double_up_to_ten_seconds(backoff: PeerBackoff, clock: Clock) -> None:
    for pause_s in (0.5, 1, 2, 4, 8, 10, 10):
        backoff.failed(PEER)
        assert len(backoff) == 1
        clock.now_s += pause_s - 0.01
        assert is_left_alone(backoff)
        clock.now_s += 0.01
        assert not is_left_alone(backoff)


def test_after_a_pause_one_tries_and_the_others_wait(backoff: PeerBackoff, clock: Clock) -> None:
    backoff.failed(PEER)
    clock.now_s += 0.5
    tried: list[bool] = []
    threads = [threading.Thread(target=lambda: tried.append(not is_left_alone(backoff))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tried) == [False] * 7 + [True]


def test_one_that_tries_and_never_reports_keeps_nobody_out_for_ever(backoff: PeerBackoff, clock: Clock) -> None:
    backoff.failed(PEER)
    for _ in range(3):
        clock.now_s += 0.5
        assert not is_left_alone(backoff)
        assert is_left_alone(backoff)


def test_an_answer_ends_the_pause_and_the_next_is_short_again(backoff: PeerBackoff, clock: Clock) -> None:
    for _ in range(4):
        backoff.failed(PEER)
    backoff.answered(PEER)
    assert not is_left_alone(backoff)
    assert len(backoff) == 0
    backoff.failed(PEER)
    clock.now_s += 0.5
    assert not is_left_alone(backoff)


def test_peers_have_nothing_to_do_with_each_other(backoff: PeerBackoff) -> None:
    backoff.failed(PEER)
    backoff.answered(OTHER)
    assert is_left_alone(backoff)
    assert not is_left_alone(backoff, OTHER)
    assert not is_left_alone(backoff, ("p1", 9001))


def test_the_error_names_the_peer() -> None:
    backoff = PeerBackoff()  # with the real clock
    backoff.failed(PEER)
    with pytest.raises(PeerUnreachableError, match="p1:9000 did not answer before"):
        backoff.check(PEER)
