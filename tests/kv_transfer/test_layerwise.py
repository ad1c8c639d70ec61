"""Prompts that D reads while P computes them: whole engines, the forward pass played by the test."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kv_transfer.decode import block_reader
from kv_transfer.prefill import progress as prefill_progress
from kv_transfer.protocol import PrefillProgress
from kv_transfer.ticket import new_ticket
from kv_transfer.transports.process_vm import ProcessVmTransport
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import KEY, until
from tests.kv_transfer.whole_engines import WholeEngine, check_arrived
from tests.kv_transfer.with_vllm import HAND_OFF, Load, Request, RequestStatus, new_request, prompt_of

FINISHED = RequestStatus.FINISHED_LENGTH_CAPPED
ABORTED = RequestStatus.FINISHED_ABORTED


class Transfer:
    """One prompt with a ticket, on P and on D."""

    def __init__(self, prefill: WholeEngine, decode: WholeEngine, prompt: list[int], num_readers: int = 1) -> None:
        self.prefill, self.decode = prefill, decode
        self.ticket = new_ticket(KEY, "127.0.0.1", prefill.engine.port)
        ours = {"omni": {"ticket": self.ticket.as_params(), "num_readers": num_readers}}
        self.at_prefill: Request = new_request(prompt, HAND_OFF | ours)
        self.at_decode, self.load = decode.admit(prompt, {"do_remote_prefill": True} | ours)

    def arrive(self) -> None:
        self.prefill.engine.side.on_new_request(self.at_prefill)

    def compute(self, num_tokens: int) -> None:
        for _ in self.prefill.compute(self.at_prefill, num_tokens):
            pass

    def finish(self, status: RequestStatus = FINISHED) -> None:
        assert self.prefill.engine.finish(self.at_prefill, status) is None
        self.tell_workers()

    def tell_workers(self) -> None:
        self.prefill.step()

    @property
    def num_bytes(self) -> int:
        """That D's first worker has read so far."""
        state = self.decode.workers[0].side._under_way.get(self.load.request_id)
        return sum(state.num_bytes.values()) if state is not None else 0


@pytest.fixture(params=["process_vm", "tcp"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[WholeEngine, WholeEngine]]:
    with (
        contextlib.closing(WholeEngine("prefill", transport=request.param)) as prefill,
        contextlib.closing(WholeEngine("decode", transport=request.param, seed=9)) as decode,
    ):
        yield prefill, decode


@pytest.fixture
def transfer(engines: tuple[WholeEngine, WholeEngine]) -> Transfer:
    return Transfer(*engines, prompt_of(60))


@pytest.mark.parametrize("chunks", [(60,), (16, 32, 12), (7, 30, 22, 1)])
@pytest.mark.parametrize("d_is_first", [True, False])
@pytest.mark.parametrize(("p_ranks", "d_ranks", "windows"), [(1, 1, (None,)), (2, 1, (None, 20)), (1, 2, (20,))])
def test_all_that_p_computes_arrives(
    chunks: tuple[int, ...], d_is_first: bool, p_ranks: int, d_ranks: int, windows: tuple[int | None, ...]
) -> None:
    with (
        contextlib.closing(WholeEngine("prefill", tp_size=p_ranks, windows=windows)) as prefill,
        contextlib.closing(WholeEngine("decode", tp_size=d_ranks, windows=windows, seed=9)) as decode,
    ):
        transfer = Transfer(prefill, decode, prompt_of(60))
        baseline = prefill.engine.num_free
        if d_is_first:
            decode.start(transfer.load)
        transfer.arrive()
        for number, chunk in enumerate(chunks):
            transfer.compute(chunk)
            if number == 0 and not d_is_first:
                decode.start(transfer.load)
        tables = prefill.engine.block_ids(transfer.at_prefill)
        transfer.finish()
        decode.wait_for(transfer.load)
        assert decode.failed == set()
        check_arrived(prefill, decode, transfer.load, tables)
        transfer.tell_workers()
        assert prefill.engine.num_free == baseline
        assert prefill.engine.leases.take_counts().released == 1


def test_layers_arrive_while_the_next_are_computed(transfer: Transfer) -> None:
    transfer.arrive()
    transfer.decode.start(transfer.load)
    num_bytes: list[int] = []
    for _ in transfer.prefill.compute(transfer.at_prefill, 60):
        before = num_bytes[-1] if num_bytes else 0
        until(lambda before=before: transfer.num_bytes > before, "the layer was not read")  # type: ignore[misc]
        num_bytes.append(transfer.num_bytes)
    assert num_bytes == [num_bytes[0] * n for n in (1, 2, 3)]  # each once
    transfer.finish()
    transfer.decode.wait_for(transfer.load)
    assert transfer.decode.failed == set()


def test_what_d_has_cached_is_not_read(engines: tuple[WholeEngine, WholeEngine]) -> None:
    prefill, decode = engines
    decode.engine.prefill(new_request(prompt_of(60)[:32]))
    transfer = Transfer(prefill, decode, prompt_of(60))
    assert transfer.load.first_token == 32
    cached = transfer.load.local_block_ids[0][:2]
    before = {name: cache[list(cached)].clone() for name, cache in decode.workers[0].caches_BHNC.items()}
    transfer.arrive()
    decode.start(transfer.load)
    transfer.compute(60)
    tables = prefill.engine.block_ids(transfer.at_prefill)
    transfer.finish()
    decode.wait_for(transfer.load)
    check_arrived(prefill, decode, transfer.load, tables)
    after = {name: cache[list(cached)] for name, cache in decode.workers[0].caches_BHNC.items()}
    assert all(after[name].equal(before[name]) for name in before)


def failed(transfer: Transfer, reason: str) -> None:
    transfer.decode.wait_for(transfer.load)
    assert transfer.decode.failed == {transfer.load.request_id}
    assert transfer.decode.failures() == {reason: 1}


@pytest.mark.parametrize("num_computed", [0, 16])
def test_a_prefill_that_is_aborted_fails_the_load(transfer: Transfer, num_computed: int) -> None:
    transfer.arrive()
    transfer.decode.start(transfer.load)
    if num_computed:
        transfer.compute(num_computed)
    transfer.finish(ABORTED)
    failed(transfer, "refused")


def test_a_prefill_that_is_preempted_fails_the_load(transfer: Transfer) -> None:
    transfer.arrive()
    transfer.decode.start(transfer.load)
    transfer.compute(16)
    until(lambda: transfer.num_bytes > 0, "nothing was read")
    transfer.prefill.engine.preempt(transfer.at_prefill)
    transfer.tell_workers()
    failed(transfer, "refused")
    transfer.compute(60)
    transfer.finish()
    assert not transfer.prefill.engine.side.wants_a_step()


def test_blocks_that_p_gives_up_during_the_last_read_void_it(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is computed, and preempted before D has read it: D must not take what comes after for it."""
    reading, go_on = threading.Event(), threading.Event()
    for transport in (TcpTransport, ProcessVmTransport):

        def slow_read(*args: Any, read: Any = transport.read) -> None:
            reading.set()
            assert go_on.wait(10)
            read(*args)

        monkeypatch.setattr(transport, "read", slow_read)
    transfer.arrive()
    transfer.compute(60)
    transfer.decode.start(transfer.load)
    assert reading.wait(10)
    transfer.prefill.engine.preempt(transfer.at_prefill)
    transfer.tell_workers()
    go_on.set()
    failed(transfer, "lease_ended")
    transfer.prefill.engine.finish(transfer.at_prefill, ABORTED)


def test_another_prompt_under_the_ticket_fails_the_load(engines: tuple[WholeEngine, WholeEngine]) -> None:
    prefill, decode = engines
    transfer = Transfer(prefill, decode, prompt_of(60))
    transfer.at_prefill = new_request(prompt_of(60, seed=2), transfer.at_prefill.kv_transfer_params)
    transfer.arrive()
    decode.start(transfer.load)
    transfer.compute(60)
    failed(transfer, "refused")
    transfer.finish()
    assert prefill.engine.leases.end(transfer.ticket.transfer_id)
    transfer.tell_workers()


def test_an_abort_on_d_ends_the_load_and_p_need_not_wait(transfer: Transfer) -> None:
    transfer.arrive()
    transfer.decode.start(transfer.load)
    transfer.compute(16)
    until(lambda: transfer.num_bytes > 0, "nothing was read")
    transfer.decode.engine.finish(transfer.at_decode, ABORTED)
    transfer.decode.step()
    failed(transfer, "cancelled")
    assert transfer.prefill.engine.leases.has_ended
    transfer.compute(44)
    transfer.finish()
    assert transfer.prefill.engine.num_free == transfer.prefill.engine.manager.block_pool.num_gpu_blocks - 1


def test_a_prompt_that_p_never_gets_ends_with_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """P is alive and says so once a second; the time limit is max_lease_s."""
    monkeypatch.setattr(prefill_progress, "HEARTBEAT_S", 0.05)
    with (
        contextlib.closing(WholeEngine("prefill")) as prefill,
        contextlib.closing(WholeEngine("decode", seed=9, lease_s=0.1, max_lease_s=0.4)) as decode,
    ):
        transfer = Transfer(prefill, decode, prompt_of(60))
        decode.start(transfer.load)
        failed(transfer, "deadline")


def test_a_p_that_falls_silent_ends_the_load(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "_SILENCE_S", 0.3)
    transfer.decode.start(transfer.load)  # P would tell once a second that it is alive
    failed(transfer, "deadline")


def test_a_p_that_ends_ends_the_load(transfer: Transfer) -> None:
    transfer.arrive()
    transfer.decode.start(transfer.load)
    transfer.compute(16)
    until(lambda: transfer.num_bytes > 0, "nothing was read")
    transfer.prefill.workers[0].side.close()
    transfer.decode.wait_for(transfer.load)
    assert transfer.decode.failed == {transfer.load.request_id}


def test_the_first_ticket_after_a_restart_of_p_is_good(engines: tuple[WholeEngine, WholeEngine]) -> None:
    """It does not say which run of P is meant; D knew the one before."""
    prefill, decode = engines
    decode.run(decode.admit(prompt_of(40), prefill.engine.hand_off(prompt_of(40)))[1])
    port = prefill.engine.port
    prefill.close()
    with contextlib.closing(WholeEngine("prefill", seed=5, listen_port=port)) as again:
        transfer = Transfer(again, decode, prompt_of(60, seed=3))
        transfer.arrive()
        decode.start(transfer.load)
        transfer.compute(60)
        tables = again.engine.block_ids(transfer.at_prefill)
        transfer.finish()
        decode.wait_for(transfer.load)
        assert decode.failed == set()
        check_arrived(again, decode, transfer.load, tables)


def test_a_last_report_of_too_few_tokens_is_not_believed(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = prefill_progress._Prefill.progress

    def early(prefill: Any) -> PrefillProgress:
        return msgspec.structs.replace(progress(prefill), is_last=True)

    monkeypatch.setattr(prefill_progress._Prefill, "progress", early)
    transfer.arrive()
    transfer.compute(32)
    transfer.decode.start(transfer.load)
    failed(transfer, "protocol")
    transfer.finish(ABORTED)


def test_several_prompts_in_one_step(engines: tuple[WholeEngine, WholeEngine]) -> None:
    """Pulled and followed loads share threads; each prompt gets its own bytes. A second reader holds P's blocks."""
    prefill, decode = engines
    transfers = [Transfer(prefill, decode, prompt_of(20, seed=seed), num_readers=2) for seed in range(3)]
    params = prefill.engine.prefill(new_request(prompt_of(40, seed=9), HAND_OFF | {"omni": {"num_readers": 2}}))
    assert params is not None
    _, pulled = decode.admit(prompt_of(40, seed=9), params)
    loads: list[Load] = [pulled, *(transfer.load for transfer in transfers)]
    decode.start(*loads)
    tables = {}
    for transfer in transfers:
        transfer.arrive()
        transfer.compute(20)
        tables[transfer.load.request_id] = prefill.engine.block_ids(transfer.at_prefill)
        transfer.finish()
    decode.wait_for(*loads)
    assert decode.failed == set()
    check_arrived(prefill, decode, pulled, params["remote_block_ids"])
    for transfer in transfers:
        check_arrived(prefill, decode, transfer.load, tables[transfer.load.request_id])
