"""D keeps the leases alive of what it has accepted and not yet read; real time, real control ports."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from tests.kv_transfer.rank_peers import cpu_seconds_of, until
from tests.kv_transfer.with_vllm import Engine, RequestStatus, lease_id, prompt_of

LEASE_S = 30.0


@pytest.fixture
def prefill() -> Iterator[Engine]:
    with contextlib.closing(Engine("prefill")) as engine:
        yield engine


@pytest.fixture
def quick() -> Iterator[Engine]:
    """Beats every 50 ms."""
    with contextlib.closing(Engine("decode", lease_s=0.15)) as decode:
        yield decode


def test_a_lease_lives_while_its_prompt_waits_or_loads(prefill: Engine, quick: Engine) -> None:
    prompt = prompt_of(40)
    request = quick.arrives(prompt, prefill.hand_off(prompt))

    def outlives_its_time() -> None:
        (lease,) = prefill.leases._open.values()
        prefill.clock_skipped_s += LEASE_S - 5  # 5 s before its end
        extended_to = lease.deadline + LEASE_S - 6
        until(lambda: lease.deadline > extended_to, "no heartbeat came")

    outlives_its_time()
    quick.admit(request)
    outlives_its_time()
    quick.side.loads_ended([request.request_id])
    assert not quick.decode._keeper._kept
    time.sleep(0.15)  # a beat under way ends
    (lease,) = prefill.leases._open.values()
    deadline = lease.deadline
    time.sleep(0.2)
    assert lease.deadline == deadline


def known_to_the_keeper(quick: Engine) -> None:
    until(lambda: all(kept.was_open for kept in quick.decode._keeper._kept.values()), "no heartbeat")


def test_a_lost_lease_cancels_its_load(prefill: Engine, quick: Engine) -> None:
    prompt = prompt_of(40)
    params = prefill.hand_off(prompt)
    request = quick.arrives(prompt, params)
    quick.admit(request)
    known_to_the_keeper(quick)
    prefill.leases.end(lease_id(params))
    until(lambda: quick.step().cancelled == (request.request_id,), "the load goes on")
    assert quick.step().cancelled == ()
    quick.side.loads_ended([request.request_id])


def test_a_prompt_whose_lease_is_lost_before_it_is_scheduled_is_computed(prefill: Engine, quick: Engine) -> None:
    prompt = prompt_of(40)
    params = prefill.hand_off(prompt)
    request = quick.arrives(prompt, params)
    known_to_the_keeper(quick)
    prefill.leases.end(lease_id(params))
    until(lambda: not (quick.step().cancelled or quick.decode._sources), "it still counts on P")
    assert quick.side.num_tokens_to_load(request, 0) == (0, False)
    assert quick.decode.take_failures() == ["lease_ended"]
    assert quick.admit(request) == ()


def test_an_idle_engine_spins_no_thread(prefill: Engine, quick: Engine) -> None:
    prompt = prompt_of(40)
    quick.finish(quick.arrives(prompt, prefill.hand_off(prompt)), RequestStatus.FINISHED_ABORTED)
    until(lambda: prefill.leases.has_ended, "the lease was not released")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]
    assert {"kv-lease-keeper", "kv-control"} <= {thread.name for thread in threads}
    with cpu_seconds_of(*threads) as used_s:
        time.sleep(0.3)
        assert used_s() < 0.05
