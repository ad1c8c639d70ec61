"""kill -9 of an engine while others hold, or wait for, KV of its memory."""

import json
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.e2e.deployments import Server, eventually
from tests.e2e.equality import COMPLETIONS, completion
from tests.e2e.kv_faults.engines import LEASE_S, LOAD_TIMEOUT_S, Engines
from tests.e2e.kv_faults.injectors import kill, shared_memory_of
from tests.e2e.kv_faults.pair import BUSY_S, Pair, fresh_text, timed

pytestmark = pytest.mark.engine


def test_a_prefill_engine_dies_after_the_hand_off(engines: Engines, pair: Pair) -> None:
    """Policy recompute: D answers right. Policy fail: 500. P comes back to its ports, and is not taken for what it was.

    This D has its memory open, and can still read the dead engine's KV; but nobody vouches for it any more.
    """
    texts = [fresh_text() for _ in range(3)]
    early, failing, late = (pair.hand_off(text) for text in texts)
    before = pair.counts()
    doomed = engines.family("prefill")
    pid = doomed[0].pid
    assert shared_memory_of(pid)
    kill(doomed)

    with timed(LOAD_TIMEOUT_S + BUSY_S):
        assert pair.finish(texts[0], early) == pair.expected(texts[0])
    assert before.eventually(failures=1, loads=0)
    assert _refused(engines.bfloat16, texts[1], failing) == 500

    assert eventually(lambda: pair.prefill.is_ready() and engines.pid("prefill") != pid, BUSY_S)
    assert not shared_memory_of(pid)
    again = pair.hand_off(fresh_text())
    assert again["remote_port"] == early["remote_port"]
    assert again["omni"]["run_id"] != early["omni"]["run_id"]
    assert pair.finish(texts[2], late) == pair.expected(texts[2])
    assert before.eventually(failures=2, loads=0)


def test_a_decode_engine_dies_with_leases(engines: Engines, pair: Pair) -> None:
    """Nobody reads what it was to read: P's blocks are free when their time is up."""
    before = pair.counts()
    doomed = engines.family("decode")
    pid = doomed[0].pid
    pair.hand_off(fresh_text())
    kill(doomed)
    assert eventually(pair.prefill_is_empty, LEASE_S + BUSY_S)
    assert eventually(lambda: pair.decode.is_ready() and engines.pid("decode") != pid, BUSY_S)
    assert not shared_memory_of(pid)
    assert before.eventually(expired=1)


def _refused(decode: Server, text: str, params: dict[str, Any]) -> int:
    """The status of an error in OpenAI's shape."""
    with timed(LOAD_TIMEOUT_S + BUSY_S), pytest.raises(HTTPError) as raised:
        decode.post(COMPLETIONS, completion(text, kv_transfer_params=params))
    error = json.load(raised.value)["error"]
    assert error["code"] == raised.value.code
    assert error["message"]
    assert error["type"]
    return raised.value.code
