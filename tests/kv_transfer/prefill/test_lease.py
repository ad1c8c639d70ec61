import random

import pytest

from kv_transfer.prefill import lease as lease_module
from kv_transfer.prefill.lease import Lease, LeaseCounts, LeaseTable
from tests.kv_transfer.prefill.clock import LEASE_S, MAX_LEASE_S, Clock


class Changes:
    def __init__(self) -> None:
        self.num = 0

    def __call__(self) -> None:
        self.num += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def table(clock: Clock, changes: Changes) -> LeaseTable:
    return LeaseTable(lease_s=LEASE_S, max_lease_s=MAX_LEASE_S, on_change=changes, clock=clock)


def returned(table: LeaseTable) -> list[tuple[int, ...]]:
    return [lease.block_ids for lease in table.take_ended()]


# --- reads


def test_the_last_read_ends_the_lease_and_gives_its_blocks_back_once(table: LeaseTable) -> None:
    lease = table.grant([5, 3, 8], num_readers=1)
    assert len(table) == 1
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "reader", 0, 1)
    assert len(table) == 0
    assert table.has_ended
    assert returned(table) == [(5, 3, 8)]
    assert not table.has_ended
    assert returned(table) == []


def test_a_read_of_an_ended_or_unknown_lease_is_void(table: LeaseTable) -> None:
    lease = table.grant([1], num_readers=1)
    assert table.end_read(lease.lease_id, "reader", 0, 1)
    assert not table.end_read(lease.lease_id, "late reader", 0, 1)
    assert not table.end_read("no such lease", "reader", 0, 1)
    assert not table.end_read("no such lease", "reader", None, 1)
    assert len(table.take_ended()) == 1


@pytest.mark.parametrize(("num_readers", "num_ranks"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_every_reader_on_every_rank_must_end(table: LeaseTable, num_readers: int, num_ranks: int) -> None:
    lease = table.grant([1, 2], num_readers)
    reads = [(f"reader-{reader}", rank) for reader in range(num_readers) for rank in range(num_ranks)]
    random.Random(1).shuffle(reads)
    for reader, rank in reads:
        assert not table.has_ended
        assert table.end_read(lease.lease_id, reader, rank, num_ranks)
    assert table.has_ended


def test_readers_may_differ_in_ranks(table: LeaseTable) -> None:
    lease = table.grant([1], num_readers=2)
    assert table.end_read(lease.lease_id, "wide", 1, 2)
    assert table.end_read(lease.lease_id, "narrow", 0, 1)
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "wide", 0, 2)
    assert table.has_ended


def test_ending_the_same_read_twice_counts_once(table: LeaseTable) -> None:
    lease = table.grant([1], num_readers=2)
    for _ in range(5):
        assert table.end_read(lease.lease_id, "reader", 1, 2)
    assert table.end_read(lease.lease_id, "reader", 0, 2)
    for rank in (0, 1, None):
        assert table.end_read(lease.lease_id, "reader", rank, 2)
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "other", None, 2)
    assert table.has_ended


def test_no_rank_means_every_rank(table: LeaseTable) -> None:
    lease = table.grant([1], num_readers=2)
    assert table.end_read(lease.lease_id, "first", None, 4)
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "second", 3, 4)
    assert table.end_read(lease.lease_id, "second", None, 4)
    assert table.has_ended


def test_a_lease_that_nobody_needs_is_ended_whoever_has_read(table: LeaseTable, changes: Changes) -> None:
    lease = table.grant([1, 2], num_readers=3)
    table.end_read(lease.lease_id, "reader", 0, 1)
    assert table.end(lease.lease_id)
    assert changes.num == 2
    assert not table.end(lease.lease_id)
    assert not table.end("no such lease")
    assert not table.end_read(lease.lease_id, "late reader", 0, 1)
    assert returned(table) == [(1, 2)]
    assert table.take_counts() == LeaseCounts(granted=1, released=1, expired=0)


# --- time


def test_the_deadline_itself_is_too_late(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    clock.now_s += LEASE_S
    assert not table.end_read(lease.lease_id, "reader", 0, 1)
    assert table.take_counts() == LeaseCounts(granted=1, released=0, expired=1)


def test_just_before_the_deadline_is_in_time(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    clock.now_s += LEASE_S - 0.001
    table.expire()
    assert table.end_read(lease.lease_id, "reader", 0, 1)


def test_expiry_ends_only_the_leases_whose_time_is_up(table: LeaseTable, clock: Clock) -> None:
    table.grant([1], num_readers=1)
    clock.now_s += 10
    younger = table.grant([2], num_readers=1)
    assert table.seconds_to_expiry() == LEASE_S - 10
    clock.now_s += LEASE_S - 10
    assert table.seconds_to_expiry() == 0
    table.expire()
    assert returned(table) == [(1,)]
    assert table.seconds_to_expiry() == 10
    clock.now_s += 100
    assert table.seconds_to_expiry() == 0  # never negative
    assert table.end_read(younger.lease_id, "reader", 0, 1) is False
    assert table.seconds_to_expiry() is None


def test_an_extension_gives_the_lease_its_time_again(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    other = table.grant([2], num_readers=1)
    clock.now_s += LEASE_S - 1
    assert table.extend([lease.lease_id, "no such lease"]) == [lease.lease_id]
    assert table.extend([]) == []
    clock.now_s += LEASE_S - 1
    assert not table.end_read(other.lease_id, "reader", 0, 1)
    assert table.end_read(lease.lease_id, "reader", 0, 1)


def test_extensions_end_at_the_longest_life(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    for _ in range(99):
        clock.now_s += 1
        assert table.extend([lease.lease_id]) == [lease.lease_id]
    assert table.seconds_to_expiry() == MAX_LEASE_S - 99
    clock.now_s += 1
    assert table.extend([lease.lease_id]) == []
    assert returned(table) == [(1,)]


def test_an_ended_lease_is_not_extended(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    clock.now_s += LEASE_S
    assert table.extend([lease.lease_id]) == []
    assert returned(table) == [(1,)]
    assert not table.end_read(lease.lease_id, "reader", 0, 1)


# --- early leases


def test_an_early_lease_lives_until_its_prompt_is_computed_and_then_for_its_time(
    table: LeaseTable, clock: Clock
) -> None:
    assert table.open_early("ticket", num_readers=1)
    assert table.seconds_to_expiry() is None
    clock.now_s += 100 * MAX_LEASE_S
    assert table.extend(["ticket"]) == ["ticket"]
    table.expire()
    assert len(table) == 1
    assert table.fill("ticket", [4, 2])
    assert table.seconds_to_expiry() == LEASE_S
    clock.now_s += LEASE_S
    table.expire()
    (ended,) = table.take_ended()
    assert ended.block_ids == (4, 2)
    assert ended.was_early
    assert not table.fill("ticket", [4, 2])


def test_its_longest_life_counts_from_when_it_was_computed(table: LeaseTable, clock: Clock) -> None:
    table.open_early("ticket", num_readers=1)
    clock.now_s += 10 * MAX_LEASE_S
    table.fill("ticket", [1])
    for _ in range(99):
        clock.now_s += 1
        assert table.extend(["ticket"]) == ["ticket"]
    clock.now_s += 1
    assert table.extend(["ticket"]) == []


@pytest.mark.parametrize("how", ["read", "end"])
def test_an_early_lease_may_end_before_its_prompt_is_computed(table: LeaseTable, how: str) -> None:
    table.open_early("ticket", num_readers=1)
    ended = table.end("ticket") if how == "end" else table.end_read("ticket", "reader", None, 1)
    assert ended
    assert returned(table) == [()]
    assert not table.fill("ticket", [1, 2])  # its blocks are the caller's
    assert returned(table) == []


def test_an_id_stands_for_one_generation_of_blocks(table: LeaseTable) -> None:
    """A ticket that is used again opens nothing: a read under the first lease would pass for one under the second."""
    assert table.open_early("ticket", num_readers=1)
    assert not table.open_early("ticket", num_readers=1)
    table.end("ticket")
    assert not table.open_early("ticket", num_readers=1)
    assert not table.end_read("ticket", "reader", None, 1)
    assert table.take_counts() == LeaseCounts(granted=1, released=1)


def test_of_used_ids_only_so_many_are_remembered(table: LeaseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_MAX_REMEMBERED", 3)
    for index in range(10):
        assert table.open_early(str(index), num_readers=1)
    assert not table.open_early("9", num_readers=1)
    assert len(table._early_ids) == 3


# --- waking


def test_on_change_is_called_for_the_first_lease_and_for_each_end(
    table: LeaseTable, clock: Clock, changes: Changes
) -> None:
    first = table.grant([1], num_readers=1)
    assert changes.num == 1
    table.grant([2], num_readers=1)  # the sleeper already sleeps no longer than until the first one's deadline
    assert changes.num == 1
    table.end_read(first.lease_id, "reader", 0, 1)
    assert changes.num == 2
    table.expire()
    assert changes.num == 2
    clock.now_s += LEASE_S
    table.expire()
    assert changes.num == 3
    table.grant([3], num_readers=1)
    assert changes.num == 4


def test_the_sleeper_is_woken_for_the_first_lease_that_can_expire(table: LeaseTable, changes: Changes) -> None:
    """Beside early leases, which cannot, it sleeps without a limit."""
    table.open_early("one", num_readers=1)
    assert changes.num == 0
    table.grant([1], num_readers=1)
    assert changes.num == 1
    table.fill("one", [2])
    assert changes.num == 2


def test_on_change_is_called_without_the_lock(clock: Clock) -> None:
    sizes: list[int] = []
    own = LeaseTable(
        lease_s=LEASE_S,
        max_lease_s=MAX_LEASE_S,
        on_change=lambda: sizes.append(len(own.take_ended())),
        clock=clock,
    )
    lease = own.grant([1], num_readers=1)
    own.end_read(lease.lease_id, "reader", 0, 1)
    own.open_early("ticket", 1)
    own.fill("ticket", [1])
    own.end("ticket")
    assert sizes == [0, 1, 0, 1]


# --- the rest


def test_counts_are_taken_once(table: LeaseTable, clock: Clock) -> None:
    read = table.grant([1], num_readers=1)
    table.grant([2], num_readers=1)
    table.end_read(read.lease_id, "reader", 0, 1)
    clock.now_s += LEASE_S
    table.expire()
    assert table.take_counts() == LeaseCounts(granted=2, released=1, expired=1)
    assert table.take_counts() == LeaseCounts()


def test_lease_ids_cannot_be_guessed(table: LeaseTable) -> None:
    ids = {table.grant([1], num_readers=1).lease_id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(lease_id) == 32 for lease_id in ids)


def test_a_lease_for_nobody_is_our_own_mistake(table: LeaseTable) -> None:
    with pytest.raises(AssertionError):
        Lease(lease_id="x", block_ids=(1,), num_readers=0, granted_at=0.0, deadline=0.0)
    with pytest.raises(AssertionError):
        table.grant([1], num_readers=0)


class TestWaivedBeforeItIsOpened:
    """D and the proxy can be faster than P's queue."""

    def test_the_only_reader(self, table: LeaseTable) -> None:
        assert not table.end_read("early", "reader", None, 1)
        assert not table.open_early("early", 1)
        assert len(table) == 0

    def test_one_of_two_readers(self, table: LeaseTable) -> None:
        table.end_read("early", "one", None, 1)
        assert table.open_early("early", 2)
        assert table.end_read("early", "two", 0, 1)
        assert len(table) == 0

    def test_the_whole_lease(self, table: LeaseTable) -> None:
        assert not table.end("early")
        assert not table.open_early("early", 3)

    def test_a_rank_that_read_for_nothing_waives_nothing(self, table: LeaseTable) -> None:
        table.end_read("early", "reader", 0, 1)
        assert table.open_early("early", 1)

    def test_the_oldest_are_forgotten(self, table: LeaseTable, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease_module, "_MAX_REMEMBERED", 2)
        for lease_id in ("one", "two", "three"):
            table.end(lease_id)
        assert table.open_early("one", 1)
        assert not table.open_early("three", 1)
