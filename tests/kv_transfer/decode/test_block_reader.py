"""Loads that must fail, and in which way; and what is kept of a P from one load to the next."""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kv_transfer.auth import DeploymentKey
from kv_transfer.decode import block_reader
from kv_transfer.protocol import Fingerprint
from kv_transfer.transports.process_vm import ProcessVmTransport
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import OTHER_KEY, until
from tests.kv_transfer.whole_engines import B, WholeEngine, check_arrived
from tests.kv_transfer.with_vllm import Load, prompt_of, silent

PROMPT = prompt_of(40)


@pytest.fixture
def prefill() -> Iterator[WholeEngine]:
    with contextlib.closing(WholeEngine("prefill", seed=1)) as engine:
        yield engine


@pytest.fixture(params=["process_vm", "tcp"])
def decode(request: pytest.FixtureRequest) -> Iterator[WholeEngine]:
    with contextlib.closing(WholeEngine("decode", seed=9, transport=request.param)) as engine:
        yield engine


def load_of(prefill: WholeEngine, decode: WholeEngine) -> Load:
    """The next one, of a prompt that P has handed off just now."""
    return decode.admit(PROMPT, prefill.engine.hand_off(PROMPT))[1]


def test_a_lease_that_ended_before_the_read_did_voids_it(prefill: WholeEngine, decode: WholeEngine) -> None:
    load = load_of(prefill, decode)
    prefill.engine.clock_skipped_s = 30
    decode.run(load)
    assert decode.failed == {load.request_id}
    assert decode.failures() == {"lease_ended": 1}


def test_a_lease_that_never_was_voids_the_read(prefill: WholeEngine, decode: WholeEngine) -> None:
    load = dataclasses.replace(load_of(prefill, decode), lease_id="forged")
    decode.run(load)
    assert decode.failures() == {"lease_ended": 1}
    assert len(prefill.engine.leases) == 1


def test_memory_that_p_reuses_during_the_read_voids_it(
    prefill: WholeEngine, decode: WholeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease expires while bytes move, and P computes another prompt into the blocks."""
    for transport in (TcpTransport, ProcessVmTransport):

        def slow_read(*args: Any, read: Any = transport.read) -> None:
            read(*args)
            prefill.engine.clock_skipped_s = 30

        monkeypatch.setattr(transport, "read", slow_read)
    load = load_of(prefill, decode)
    decode.run(load)
    assert decode.failures() == {"lease_ended": 1}


@pytest.mark.parametrize(
    ("tables", "reason"), [(((B, 1, 2),), "hand_off"), (((1,),), "hand_off"), (((1, 0, 2),), "hand_off")]
)
def test_blocks_that_cannot_be_fail_their_load_alone(
    prefill: WholeEngine, decode: WholeEngine, tables: Any, reason: str
) -> None:
    """Beyond P's memory, too few, or given up."""
    bad, good = load_of(prefill, decode), load_of(prefill, decode)
    bad = dataclasses.replace(bad, remote_block_ids=tables)
    decode.run(bad, good)
    assert decode.failed == {bad.request_id}
    assert decode.failures() == {reason: 1}


def test_a_p_of_another_model_is_refused(prefill: WholeEngine, decode: WholeEngine) -> None:
    decode.workers[0].side._reader._fingerprint = Fingerprint(vllm_version="0", model="m", kv_cache_dtype="bf16")
    decode.run(load_of(prefill, decode))
    assert decode.failures() == {"refused": 1}
    assert decode.workers[0].side._reader.num_peers_left_alone == 0  # it did answer


def test_a_p_with_other_layers_is_refused(decode: WholeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(WholeEngine("prefill", num_heads=2)) as prefill:
        decode.run(load_of(prefill, decode))
    assert decode.failures() == {"refused": 1}
    assert "KV head 2 of layer layers.0.attn is on none" in caplog.text


def test_no_transport_that_both_have(prefill: WholeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with (
        contextlib.closing(WholeEngine("prefill", transport="tcp")) as prefill,
        contextlib.closing(WholeEngine("decode", transport="process_vm")) as decode,
    ):
        decode.run(load_of(prefill, decode))
        assert decode.failures() == {"refused": 1}
        assert "offers tcp; this side can use process_vm" in caplog.text


@pytest.mark.parametrize("key", [OTHER_KEY, DeploymentKey(b"y" * 32)])
def test_a_p_of_another_deployment_gets_no_answer(
    prefill: WholeEngine, decode: WholeEngine, key: DeploymentKey
) -> None:
    load = load_of(prefill, decode)
    decode.workers[0].side._reader._controls._key = key
    decode.run(load)
    assert decode.failures() == {"unreachable": 1}
    assert len(prefill.engine.leases) == 1


# --- P is gone, or another


def restarted(prefill: WholeEngine) -> WholeEngine:
    """P again, on the same control port."""
    port = prefill.engine.port
    prefill.close()
    return WholeEngine("prefill", seed=5, listen_port=port)


def test_a_restarted_p_on_the_same_port_is_greeted_anew(prefill: WholeEngine, decode: WholeEngine) -> None:
    stale = load_of(prefill, decode)
    decode.run(load_of(prefill, decode))
    reader = decode.workers[0].side._reader
    (before,) = reader._engines.values()
    with contextlib.closing(restarted(prefill)) as again:
        params = again.engine.hand_off(PROMPT)
        _, fresh = decode.admit(PROMPT, params)
        decode.run(fresh)
        assert decode.failed == set()  # not even the first load after the restart
        check_arrived(again, decode, fresh, params["remote_block_ids"])
        (after,) = reader._engines.values()
        assert after.run_id != before.run_id
        assert before.sources[0].rank.endpoint not in decode.workers[0].side._client._idle

        decode.run(stale)
        assert decode.failed == {stale.request_id}
        assert decode.failures() == {"lease_ended": 1}
        assert reader._engines == {fresh.peer: after}  # what is held for the new one stays
        decode.run(load_of(again, decode))
        assert decode.failed == {stale.request_id}


def test_a_hand_off_of_an_earlier_run_does_not_keep_its_p_waiting(prefill: WholeEngine, decode: WholeEngine) -> None:
    """P was left alone while it restarted; a stale hand-off is the first to find it again."""
    stale = load_of(prefill, decode)
    with contextlib.closing(restarted(prefill)) as again:
        reader = decode.workers[0].side._reader
        reader._backoff.failed(stale.peer)
        until(lambda: time.monotonic() > reader._backoff._pauses[stale.peer].until, "the pause goes on")
        decode.run(stale)
        assert decode.failures() == {"lease_ended": 1}
        decode.run(load_of(again, decode))
        assert decode.failed == {stale.request_id}


def test_a_p_that_is_gone_fails_the_load_in_time_and_is_left_alone(prefill: WholeEngine) -> None:
    with contextlib.closing(WholeEngine("decode", seed=9)) as decode:
        first, second = load_of(prefill, decode), load_of(prefill, decode)
        prefill.close()
        decode.run(first)
        assert decode.failures() == {"unreachable": 1}
        side = decode.workers[0].side
        assert side._reader.num_peers_left_alone == 1
        decode.run(second)
        assert decode.failures() == {"unreachable": 1}
        assert decode.failed == {first.request_id, second.request_id}
        assert not side._loaders  # nor are threads kept for it
        assert not side._reader._engines


def test_peers_left_alone_appear_in_the_stats(prefill: WholeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(WholeEngine("decode", seed=9, load_timeout_s=0.3)) as decode:
        load = load_of(prefill, decode)
        side = decode.workers[0].side
        side._reader._backoff.failed(load.peer)
        assert side.take_stats().data["peers_left_alone"] == 1
        assert side.take_stats() is None
        side._reader._backoff.answered(load.peer)
        assert side.take_stats().data["peers_left_alone"] == 0
        assert side.take_stats() is None


def test_rank_server_gone_but_control_alive(prefill: WholeEngine) -> None:
    with contextlib.closing(WholeEngine("decode", seed=9, transport="tcp")) as decode:
        decode.run(load_of(prefill, decode))
        prefill.workers[0].side.close()
        decode.run(load_of(prefill, decode))
        assert decode.failures() == {"unreachable": 1}
        assert not decode.workers[0].side._reader._engines


def test_a_port_that_takes_and_never_answers_costs_the_deadline_and_no_more(prefill: WholeEngine) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        contextlib.closing(WholeEngine("decode", seed=9, load_timeout_s=0.3)) as decode,
    ):
        load = dataclasses.replace(load_of(prefill, decode), port=silent.getsockname()[1])
        decode.run(load)
        assert decode.failures() == {"deadline": 1}


def test_a_p_that_does_not_answer_costs_the_deadline_and_is_left_alone(prefill: WholeEngine) -> None:
    with contextlib.closing(WholeEngine("decode", seed=9, load_timeout_s=0.3)) as decode:
        load = load_of(prefill, decode)
        with silent(prefill.engine):
            decode.run(load)
        assert decode.failures() == {"deadline": 1}
        assert decode.workers[0].side._reader.num_peers_left_alone == 1


def test_p_that_falls_silent_after_the_read_ends_the_load(
    prefill: WholeEngine, decode: WholeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is then of no use: nobody has said that it was good."""
    monkeypatch.setattr(block_reader, "_SILENCE_S", 0.3)
    decode.run(load_of(prefill, decode))
    load = load_of(prefill, decode)
    with silent(prefill.engine):
        decode.run(load)
    assert decode.failed == {load.request_id}
    assert decode.failures() == {"deadline": 1}
