"""The client leaves: before D has begun, while D loads, while D generates, while P computes."""

import pytest

from tests.e2e.deployments import eventually
from tests.e2e.equality import completion
from tests.e2e.kv_faults.engines import LEASE_S, LOAD_TIMEOUT_S, Engines
from tests.e2e.kv_faults.injectors import HungUp, busy, stopped, waits_at
from tests.e2e.kv_faults.pair import BUSY_S, Pair, fresh_text

pytestmark = pytest.mark.engine


def test_while_the_request_waits_at_decode(engines: Engines, pair: Pair) -> None:
    """P hears of it at once: the lease is released, it does not run out."""
    text = fresh_text()
    with busy(pair.decode):
        params = pair.hand_off(text)
        before = pair.counts()
        with HungUp(pair.decode, completion(text, kv_transfer_params=params)):
            assert eventually(lambda: waits_at(pair.decode), BUSY_S)
        assert before.eventually(released=1, expired=0)
        assert eventually(pair.prefill_is_empty, BUSY_S)
    assert before.eventually(loads=0, failures=0)


def test_while_decode_loads(engines: Engines, pair: Pair) -> None:
    """The load cannot end, as P is stopped: D's blocks are held until its deadline, and no longer."""
    text = fresh_text()
    params = pair.hand_off(text)
    before = pair.counts()
    with stopped(engines.family("prefill")):
        with HungUp(pair.decode, completion(text, kv_transfer_params=params)):
            assert eventually(lambda: pair.decode.metric("vllm:kv_cache_usage_perc") > 0, LOAD_TIMEOUT_S)
        assert eventually(pair.decode_is_empty, LOAD_TIMEOUT_S + BUSY_S)
    assert before.eventually(loads=0, failures=1)


def test_while_decode_generates(engines: Engines, pair: Pair) -> None:
    text = fresh_text()
    body = completion(text, kv_transfer_params=pair.hand_off(text), max_tokens=3000, ignore_eos=True, stream=True)
    before = pair.counts()
    with HungUp(pair.decode, body) as client:
        client.read_some()
        assert eventually(pair.prefill_is_empty, BUSY_S)
    assert eventually(pair.decode_is_empty, BUSY_S)
    assert before.eventually(loads=1, failures=0)


def test_while_prefill_computes(pair: Pair) -> None:
    """The prompt takes P several steps: no lease is granted for what was computed of it."""
    asked = {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}

    def leaves_in_time() -> bool:
        before = pair.counts()
        with HungUp(pair.prefill, completion(fresh_text(3900), **asked)):
            has_begun = eventually(lambda: pair.prefill.metric("vllm:kv_cache_usage_perc") > 0, LEASE_S)
        assert eventually(pair.prefill_is_empty, LEASE_S + BUSY_S)
        return has_begun and not before.since(["granted"])

    assert eventually(leaves_in_time, BUSY_S)
