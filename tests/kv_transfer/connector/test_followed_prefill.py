"""P's part of the scheduler's half, for prompts that are followed while they are computed."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kv_transfer.connector.prompt import digest_of_prompt
from kv_transfer.ticket import Ticket, new_ticket
from tests.kv_transfer.rank_peers import KEY, OTHER_KEY
from tests.kv_transfer.with_vllm import HAND_OFF, Engine, Request, RequestStatus, new_request, prompt_of


@pytest.fixture
def prefill() -> Iterator[Engine]:
    with contextlib.closing(Engine("prefill")) as engine:
        yield engine
        engine.check_pool()


def ticket_of(prefill: Engine) -> Ticket:
    return new_ticket(KEY, "127.0.0.1", prefill.port)


def followed(ticket: Ticket, num_tokens: int = 40, num_readers: int = 1) -> Request:
    ours = {"ticket": ticket.as_params(), "num_readers": num_readers}
    return new_request(prompt_of(num_tokens), HAND_OFF | {"omni": ours})


def end_read(prefill: Engine, ticket: Ticket, reader: str = "reader") -> bool:
    return prefill.leases.end_read(ticket.transfer_id, reader, None, 1)


def finish(prefill: Engine, request: Request, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> None:
    assert prefill.finish(request, status) is None  # its parameters are with D already


def test_each_step_tells_the_workers_how_far_it_comes(prefill: Engine) -> None:
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    assert len(prefill.leases) == 1
    for end_token, num_new in ((16, 16), (30, 14), (40, 10)):
        metadata = prefill.compute(request, num_new)
        (step,) = metadata.prefills
        assert metadata.transfers_ended == ()
        assert (step.transfer_id, step.end_token, step.num_prompt_tokens) == (ticket.transfer_id, end_token, 40)
        assert step.prompt_digest == digest_of_prompt(request)
        num_blocks = -(-end_token // 16)
        assert step.block_ids == (tuple(prefill.block_ids(request)[0][:num_blocks]),)
    finish(prefill, request)
    assert end_read(prefill, ticket)
    assert prefill.step().transfers_ended == (ticket.transfer_id,)
    assert prefill.step().transfers_ended == ()


def test_a_step_without_the_prompt_says_nothing_of_it(prefill: Engine) -> None:
    request, other = followed(ticket_of(prefill)), new_request(prompt_of(20, seed=2))
    prefill.side.on_new_request(request)
    assert prefill.compute(other, 20).prefills == ()
    finish(prefill, request, RequestStatus.FINISHED_ABORTED)
    finish(prefill, other)


def test_tokens_beyond_the_prompt_are_not_reported(prefill: Engine) -> None:
    request = followed(ticket := ticket_of(prefill), num_tokens=32)
    prefill.side.on_new_request(request)
    prefill.compute(request, 32)
    request.append_output_token_ids(7)
    (step,) = prefill.compute(request, 1).prefills
    assert (step.end_token, len(step.block_ids[0])) == (32, 2)
    finish(prefill, request)
    assert end_read(prefill, ticket)
    prefill.step()


@pytest.mark.parametrize("num_readers", [1, 3])
def test_blocks_stay_after_the_prompt_until_every_follower_is_done(prefill: Engine, num_readers: int) -> None:
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill), num_readers=num_readers)
    prefill.side.on_new_request(request)
    prefill.compute(request, 40)
    finish(prefill, request)
    for reader in range(num_readers):
        prefill.step()
        assert prefill.num_free == baseline - 3
        assert end_read(prefill, ticket, f"reader-{reader}")
    assert prefill.side.wants_a_step()
    assert prefill.num_free == baseline


def test_a_follower_that_is_done_first_leaves_nothing_behind(prefill: Engine) -> None:
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    prefill.compute(request, 40)
    assert end_read(prefill, ticket)
    assert prefill.step().transfers_ended == (ticket.transfer_id,)
    assert prefill.num_free == baseline - 3  # the request's own
    finish(prefill, request)
    assert prefill.num_free == baseline
    assert not prefill.side.wants_a_step()


def test_a_lease_that_the_proxy_ended_before_the_prompt_is_not_filled(prefill: Engine) -> None:
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    assert prefill.leases.end(ticket.transfer_id)
    prefill.compute(request, 40)
    finish(prefill, request)
    assert prefill.num_free == baseline
    assert not end_read(prefill, ticket)


def test_an_early_lease_expires_only_after_it_is_filled(prefill: Engine) -> None:
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    prefill.clock_skipped_s = 1e6
    prefill.leases.expire()
    prefill.compute(request, 40)
    finish(prefill, request)
    prefill.leases.expire()
    assert len(prefill.leases) == 1
    prefill.clock_skipped_s += 31
    prefill.leases.expire()
    assert prefill.step().transfers_ended == (ticket.transfer_id,)
    assert prefill.num_free == baseline


@pytest.mark.parametrize("num_computed", [0, 16, 40])
def test_an_abort_ends_the_lease(prefill: Engine, num_computed: int) -> None:
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    if num_computed:
        prefill.compute(request, num_computed)
    finish(prefill, request, RequestStatus.FINISHED_ABORTED)
    assert not end_read(prefill, ticket)
    assert prefill.step().transfers_ended == (ticket.transfer_id,)
    assert prefill.num_free == baseline


def test_a_preemption_voids_the_lease_before_the_blocks_are_written_again(prefill: Engine) -> None:
    """A follower may still be reading, though the preempted request is in no step for long."""
    baseline = prefill.num_free
    request = followed(ticket := ticket_of(prefill))
    prefill.side.on_new_request(request)
    prefill.compute(request, 32)
    prefill.preempt(request)
    other = new_request(prompt_of(32, seed=2))
    metadata = prefill.compute(other, 32)
    assert metadata.transfers_ended == (ticket.transfer_id,)
    assert not end_read(prefill, ticket)
    assert prefill.compute(request, 40).prefills == ()  # computed again: for its own response alone
    finish(prefill, request)
    finish(prefill, other)
    assert prefill.num_free == baseline
    assert not prefill.side.wants_a_step()


def test_a_window_that_gave_up_what_d_needs_ends_the_lease() -> None:
    with contextlib.closing(Engine("prefill", windows=(None, 16))) as prefill:
        baseline = prefill.num_free
        request = followed(ticket := ticket_of(prefill), num_tokens=47)
        prefill.side.on_new_request(request)
        prefill.compute(request, 47)
        finish(prefill, request)
        assert not end_read(prefill, ticket)
        prefill.step()
        assert prefill.num_free == baseline
        prefill.check_pool()


def forged(ticket: Ticket) -> Ticket:
    return msgspec.structs.replace(ticket, prefill_host="elsewhere")


def expired(ticket: Ticket) -> Ticket:
    old = msgspec.structs.replace(ticket, expires_at=1, signature="")
    return msgspec.structs.replace(old, signature=KEY.mac("ticket", old.signed_bytes()).hex())


def of_others(ticket: Ticket) -> Ticket:
    return new_ticket(OTHER_KEY, "127.0.0.1", ticket.prefill_port)


@pytest.mark.parametrize("spoil", [forged, expired, of_others])
def test_a_ticket_that_is_none_opens_no_lease(prefill: Engine, spoil: Any) -> None:
    request = followed(spoil(ticket_of(prefill)))
    prefill.side.on_new_request(request)
    assert len(prefill.leases) == 0
    assert prefill.compute(request, 40).prefills == ()
    finish(prefill, request, RequestStatus.FINISHED_ABORTED)


def test_a_ticket_is_good_for_one_prompt(prefill: Engine) -> None:
    baseline = prefill.num_free
    ticket = ticket_of(prefill)
    first, second = followed(ticket), followed(ticket)
    for request in (first, second):
        prefill.side.on_new_request(request)
    assert len(prefill.leases) == 1
    assert prefill.compute(second, 40).prefills == ()
    prefill.finish(second, RequestStatus.FINISHED_ABORTED)
    assert end_read(prefill, ticket)  # the first's
    prefill.compute(first, 40)
    finish(prefill, first)
    prefill.step()
    third = followed(ticket)
    prefill.side.on_new_request(third)
    assert len(prefill.leases) == 0
    prefill.finish(third, RequestStatus.FINISHED_ABORTED)
    assert prefill.num_free == baseline


def test_blocks_return_to_the_baseline_after_any_order_of_events() -> None:
    """Each prompt is computed in steps, sometimes preempted or aborted; its lease is ended, read or left to expire."""
    rng = random.Random(23)
    with contextlib.closing(Engine("prefill", num_blocks=256, windows=(None, 24))) as prefill:
        baseline = prefill.num_free
        running: list[tuple[Request, Ticket]] = []
        tickets: list[Ticket] = []
        for _ in range(400):
            if len(running) < 4:
                request = followed(ticket := ticket_of(prefill), rng.randint(1, 60), rng.randint(1, 2))
                prefill.side.on_new_request(request)
                running.append((request, ticket))
                tickets.append(ticket)
            request, ticket = running[rng.randrange(len(running))]
            event = rng.random()
            remaining = request.num_prompt_tokens - request.num_computed_tokens
            if event < 0.5 and remaining:
                prefill.compute(request, remaining if request.num_computed_tokens == 0 else rng.randint(1, remaining))
            elif event < 0.6:
                prefill.leases.end(rng.choice(tickets).transfer_id)
            elif event < 0.75:
                end_read(prefill, rng.choice(tickets), f"reader-{rng.randrange(2)}")
            elif event < 0.8 and request.num_computed_tokens:
                prefill.preempt(request)
            elif event < 0.85:
                prefill.clock_skipped_s += 10
                prefill.leases.expire()
            else:
                aborted = remaining or rng.random() < 0.2
                status = RequestStatus.FINISHED_ABORTED if aborted else RequestStatus.FINISHED_LENGTH_CAPPED
                finish(prefill, request, status)
                running.remove((request, ticket))
            prefill.check_pool()
        for request, _ in running:
            finish(prefill, request, RequestStatus.FINISHED_ABORTED)
        for ticket in tickets:
            prefill.leases.end(ticket.transfer_id)
        prefill.step()
        assert prefill.num_free == baseline
        assert len(prefill.leases) == 0
        assert not prefill.side._prefill._followed
