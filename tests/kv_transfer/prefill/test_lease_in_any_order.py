"""Leases that are granted, read, extended, ended and expire in any order, in one thread and in many."""

import math
import random
import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kv_transfer.prefill.lease import LeaseTable
from tests.kv_transfer.prefill.clock import LEASE_S, MAX_LEASE_S, Clock


def test_every_lease_ends_exactly_once_under_threads() -> None:
    """Granting, filling, ending, expiring and taking back race; each block comes back once."""
    num_leases, num_readers, num_ranks = 400, 2, 2
    clock = Clock()
    table = LeaseTable(lease_s=LEASE_S, max_lease_s=MAX_LEASE_S, on_change=lambda: None, clock=clock)
    granted: list[str] = []
    back: list[int] = []
    done = threading.Event()

    def until_done(act: str) -> None:
        rng = random.Random(act)
        while not done.is_set():
            lease_id = rng.choice(granted) if granted else ""
            if act == "expire":
                clock.now_s += LEASE_S / 50
                table.expire()
                table.seconds_to_expiry()
            elif act == "take back":
                back.extend(block_id for lease in table.take_ended() for block_id in lease.block_ids)
            elif act == "end":
                table.end(lease_id)
            elif act == "extend":
                table.extend([lease_id])
            else:
                table.end_read(lease_id, f"reader-{rng.randrange(num_readers)}", rng.randrange(num_ranks), num_ranks)

    acts = ["expire", "take back", "end", "extend", "read 1", "read 2"]
    threads = [threading.Thread(target=until_done, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for block_id in range(num_leases):
        if block_id % 2:
            granted.append(table.grant([block_id], num_readers).lease_id)
        else:
            table.open_early(f"early-{block_id}", num_readers)
            granted.append(f"early-{block_id}")
            if not table.fill(f"early-{block_id}", [block_id]):
                back.append(block_id)
    done.set()
    for thread in threads:
        thread.join(timeout=10)
    clock.now_s += LEASE_S + MAX_LEASE_S
    table.expire()
    back.extend(block_id for lease in table.take_ended() for block_id in lease.block_ids)
    assert sorted(back) == list(range(num_leases))
    counts = table.take_counts()
    assert counts.granted == counts.released + counts.expired == num_leases
    assert len(table) == 0


class Model:
    """A lease as its contract has it."""

    def __init__(self, num_readers: int, begun_at: float | None) -> None:
        self.num_readers = num_readers
        self.ranks_done: dict[int, set[int]] = {}  # by reader
        self.begun_at = begun_at  # None: early
        self.ends_at = math.inf if begun_at is None else begun_at + LEASE_S

    @property
    def is_read(self) -> bool:
        return sum(len(ranks) == NUM_RANKS for ranks in self.ranks_done.values()) >= self.num_readers


NUM_RANKS = 2


class LeaseMachine(RuleBasedStateMachine):
    """Whatever happens, in whatever order: the table's answers are the model's, and the sleeper wakes in time."""

    leases = Bundle("leases")
    tickets = Bundle("tickets")
    either = leases | tickets

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.sleeps_until = math.inf
        self.table = LeaseTable(lease_s=LEASE_S, max_lease_s=MAX_LEASE_S, on_change=self.wake, clock=self.clock)
        self.open: dict[str, Model] = {}
        self.kept: list[int] = []  # blocks that must come back once
        self.back: list[int] = []
        self.num_blocks = 0
        self.num_tickets = 0

    def wake(self) -> None:
        """The control thread looks when the next lease expires, and sleeps again."""
        sleep_s = self.table.seconds_to_expiry()
        self.sleeps_until = math.inf if sleep_s is None else self.clock.now_s + sleep_s

    def new_block(self) -> int:
        self.num_blocks += 1
        self.kept.append(self.num_blocks)
        return self.num_blocks

    @rule(target=leases, num_readers=st.integers(1, 3))
    def grant(self, num_readers: int) -> str:
        lease_id = self.table.grant([self.new_block()], num_readers).lease_id
        self.open[lease_id] = Model(num_readers, self.clock.now_s)
        return lease_id

    @rule(target=tickets, num_readers=st.integers(1, 3))
    def open_early(self, num_readers: int) -> str:
        self.num_tickets += 1
        ticket = f"ticket {self.num_tickets}"
        assert self.table.open_early(ticket, num_readers)
        self.open[ticket] = Model(num_readers, None)
        return ticket

    @rule(ticket=tickets)
    def open_again(self, ticket: str) -> None:
        assert not self.table.open_early(ticket, 1)

    @rule(ticket=consumes(tickets), target=leases)
    def fill(self, ticket: str) -> str:
        block = self.new_block()
        model = self.open.get(ticket)
        assert self.table.fill(ticket, [block]) == (model is not None)
        if model is None:
            self.kept.remove(block)
        else:
            model.begun_at, model.ends_at = self.clock.now_s, self.clock.now_s + LEASE_S
        return ticket

    @rule(lease=either, reader=st.integers(0, 3), rank=st.none() | st.integers(0, NUM_RANKS - 1))
    def end_read(self, lease: str, reader: int, rank: int | None) -> None:
        model = self.open.get(lease)
        assert self.table.end_read(lease, f"reader {reader}", rank, NUM_RANKS) == (model is not None)
        if model is not None:
            model.ranks_done.setdefault(reader, set()).update(range(NUM_RANKS) if rank is None else [rank])
            if model.is_read:
                del self.open[lease]

    @rule(lease=either)
    def end(self, lease: str) -> None:
        self.table.expire()
        assert self.table.end(lease) == (self.open.pop(lease, None) is not None)

    @rule(lease=either)
    def extend(self, lease: str) -> None:
        model = self.open.get(lease)
        assert self.table.extend([lease]) == ([lease] if model is not None else [])
        if model is not None and model.begun_at is not None:
            model.ends_at = max(model.ends_at, min(self.clock.now_s + LEASE_S, model.begun_at + MAX_LEASE_S))

    @rule(seconds=st.sampled_from([0.5, 7.0, 29.0, 30.0, 60.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.open = {lease_id: model for lease_id, model in self.open.items() if model.ends_at > self.clock.now_s}
        if self.clock.now_s >= self.sleeps_until:
            self.table.expire()
            self.wake()

    @rule()
    def take_back(self) -> None:
        self.back += [block for lease in self.table.take_ended() for block in lease.block_ids]
        assert len(set(self.back)) == len(self.back)

    @invariant()
    def only_what_has_ended_comes_back(self) -> None:
        num_open = sum(model.begun_at is not None for model in self.open.values())
        assert set(self.back) <= set(self.kept)
        assert len(self.back) + num_open <= len(self.kept)

    @invariant()
    def the_sleeper_wakes_in_time(self) -> None:
        assert self.sleeps_until <= min((model.ends_at for model in self.open.values()), default=math.inf)

    def teardown(self) -> None:
        """In the end, everything has come back."""
        for lease_id in list(self.open):
            assert self.table.end(lease_id)
        self.clock.now_s += MAX_LEASE_S
        self.table.expire()
        self.take_back()
        assert sorted(self.back) == sorted(self.kept)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, database=None)
