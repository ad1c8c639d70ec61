"""SIGSTOP: an engine that is there and does nothing, for a while."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.deployments import eventually
from tests.e2e.equality import completion
from tests.e2e.kv_faults.engines import LEASE_S, LOAD_TIMEOUT_S, Engines
from tests.e2e.kv_faults.injectors import busy, stopped, waits_at
from tests.e2e.kv_faults.pair import BUSY_S, Pair, fresh_text, timed

pytestmark = pytest.mark.engine


def test_a_short_stop_of_prefill_fails_nothing(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    params = pair.hand_off(text)
    before = pair.counts()
    with ThreadPoolExecutor(1) as pool:
        with stopped(engines.family("prefill")):
            answer = pool.submit(pair.finish, text, params)
            assert eventually(lambda: _is_loading(pair), LOAD_TIMEOUT_S / 2)
        assert answer.result() == pair.expected(text)
    assert before.eventually(loads=1, failures=0)


def test_a_long_stop_of_prefill_ends_the_load_by_its_deadline(engines: Engines, pair: Pair) -> None:
    text, following = fresh_text(), fresh_text()
    params, later_params = pair.hand_off(text), pair.hand_off(following)
    before = pair.counts()
    with stopped(engines.family("prefill")):
        with timed(LOAD_TIMEOUT_S + BUSY_S):
            assert pair.finish(text, params) == pair.expected(text)
        assert before.eventually(deadline=1, failures=1, loads=0)
        assert pair.decode.metric("vllm:omni_kv_peers_left_alone") == 1
    _overwrite_prefill(pair)
    assert pair.finish(following, later_params) == pair.expected(following)  # its lease has run out meanwhile
    assert before.eventually(loads=0, failures=2)


def test_decode_stops_for_longer_than_the_lease(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    params = pair.hand_off(text)
    before = pair.counts()
    with ThreadPoolExecutor(1) as pool:
        with stopped(engines.family("decode")):
            answer = pool.submit(pair.finish, text, params)
            assert eventually(pair.prefill_is_empty, LEASE_S + BUSY_S)
            _overwrite_prefill(pair)
        assert answer.result() == pair.expected(text)
    assert before.eventually(lease_ended=1, failures=1, loads=0)


def test_a_lease_lives_while_decode_is_busy(engines: Engines, pair: Pair) -> None:
    """The request waits at D for much longer than the lease, which D's heartbeats keep alive."""
    text = fresh_text()
    before = pair.counts()
    with ThreadPoolExecutor(1) as pool:
        with busy(pair.decode):
            answer = pool.submit(pair.finish, text, pair.hand_off(text))
            assert eventually(lambda: waits_at(pair.decode), BUSY_S)
            assert not eventually(pair.prefill_is_empty, 2 * LEASE_S)
            assert waits_at(pair.decode)
        assert answer.result() == pair.expected(text)
    assert before.eventually(loads=1, failures=0)


def test_decode_stops_while_a_request_waits_there(engines: Engines, pair: Pair) -> None:
    """Its heartbeats stop with it, and what it reads afterwards is another prompt's."""
    text = fresh_text()
    before = pair.counts()
    with ThreadPoolExecutor(1) as pool:
        with busy(pair.decode):
            answer = pool.submit(pair.finish, text, pair.hand_off(text))
            assert eventually(lambda: waits_at(pair.decode), BUSY_S)
            with stopped(engines.family("decode")):
                assert eventually(pair.prefill_is_empty, LEASE_S + BUSY_S)
                _overwrite_prefill(pair)
        assert answer.result() == pair.expected(text)
    assert before.eventually(lease_ended=1, failures=1, loads=0)


def _is_loading(pair: Pair) -> bool:
    return pair.decode.metric("vllm:kv_cache_usage_perc") > 0


def _overwrite_prefill(pair: Pair) -> None:
    """Have all of P's blocks hold other prompts' KV."""
    for _ in range(5):
        pair.prefill.post("/v1/completions", completion(fresh_text(2100), max_tokens=1))
