import random
import threading

import pytest

from kv_transfer.lease import Lease, LeaseCounts, LeaseTable

LEASE_S = 30.0


class Clock:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


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


def table_of(clock: Clock, changes: Changes, *, tp_size: int = 1) -> LeaseTable:
    return LeaseTable(lease_s=LEASE_S, tp_size=tp_size, on_change=changes, clock=clock)


@pytest.fixture
def table(clock: Clock, changes: Changes) -> LeaseTable:
    return table_of(clock, changes)


def test_the_last_read_ends_the_lease_and_gives_its_blocks_back_once(table: LeaseTable) -> None:
    lease = table.grant([5, 3, 8], num_readers=1)
    assert len(table) == 1
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "reader", 0)
    assert len(table) == 0
    assert table.has_ended
    assert [ended.block_ids for ended in table.take_ended()] == [(5, 3, 8)]
    assert not table.has_ended
    assert table.take_ended() == []


def test_a_read_of_an_ended_or_unknown_lease_is_void(table: LeaseTable) -> None:
    lease = table.grant([1], num_readers=1)
    assert table.end_read(lease.lease_id, "reader", 0)
    assert not table.end_read(lease.lease_id, "late reader", 0)
    assert not table.end_read("no such lease", "reader", 0)
    assert not table.end_read("no such lease", "reader", None)
    assert len(table.take_ended()) == 1


def test_the_deadline_itself_is_too_late(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    clock.now_s += LEASE_S
    assert not table.end_read(lease.lease_id, "reader", 0)
    assert table.take_counts() == LeaseCounts(granted=1, released=0, expired=1)


def test_just_before_the_deadline_is_in_time(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], num_readers=1)
    clock.now_s += LEASE_S - 0.001
    table.expire()
    assert table.end_read(lease.lease_id, "reader", 0)


def test_expiry_ends_only_the_leases_whose_time_is_up(table: LeaseTable, clock: Clock) -> None:
    table.grant([1], num_readers=1)
    clock.now_s += 10
    younger = table.grant([2], num_readers=1)
    assert table.seconds_to_expiry() == LEASE_S - 10
    clock.now_s += LEASE_S - 10
    assert table.seconds_to_expiry() == 0
    table.expire()
    assert [lease.block_ids for lease in table.take_ended()] == [(1,)]
    assert table.seconds_to_expiry() == 10
    clock.now_s += 100
    assert table.seconds_to_expiry() == 0  # never negative
    assert table.end_read(younger.lease_id, "reader", 0) is False
    assert table.seconds_to_expiry() is None


@pytest.mark.parametrize(("num_readers", "tp_size"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_every_reader_on_every_rank_must_end(clock: Clock, changes: Changes, num_readers: int, tp_size: int) -> None:
    table = table_of(clock, changes, tp_size=tp_size)
    lease = table.grant([1, 2], num_readers)
    reads = [(f"reader-{reader}", rank) for reader in range(num_readers) for rank in range(tp_size)]
    random.Random(1).shuffle(reads)
    for reader, rank in reads:
        assert not table.has_ended
        assert table.end_read(lease.lease_id, reader, rank)
    assert table.has_ended


def test_ending_the_same_read_twice_counts_once(clock: Clock, changes: Changes) -> None:
    table = table_of(clock, changes, tp_size=2)
    lease = table.grant([1], num_readers=1)
    for _ in range(5):
        assert table.end_read(lease.lease_id, "reader", 1)
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "reader", 0)
    assert table.has_ended


def test_no_rank_means_every_rank(clock: Clock, changes: Changes) -> None:
    table = table_of(clock, changes, tp_size=4)
    lease = table.grant([1], num_readers=2)
    assert table.end_read(lease.lease_id, "first", None)
    assert not table.has_ended
    assert table.end_read(lease.lease_id, "second", None)
    assert table.has_ended


def test_a_rank_that_does_not_exist_ends_nothing(clock: Clock, changes: Changes) -> None:
    table = table_of(clock, changes, tp_size=2)
    lease = table.grant([1], num_readers=1)
    assert not table.end_read(lease.lease_id, "reader", 2)
    assert not table.end_read(lease.lease_id, "reader", 4095)
    assert len(table) == 1


def test_on_change_is_called_for_the_first_lease_and_for_each_end(
    table: LeaseTable, clock: Clock, changes: Changes
) -> None:
    first = table.grant([1], num_readers=1)
    assert changes.num == 1
    table.grant([2], num_readers=1)  # the sleeper already sleeps no longer than until the first one's deadline
    assert changes.num == 1
    table.end_read(first.lease_id, "reader", 0)
    assert changes.num == 2
    table.expire()
    assert changes.num == 2
    clock.now_s += LEASE_S
    table.expire()
    assert changes.num == 3
    table.grant([3], num_readers=1)
    assert changes.num == 4


def test_on_change_is_called_without_the_lock(clock: Clock) -> None:
    sizes: list[int] = []
    table = LeaseTable(lease_s=LEASE_S, tp_size=1, on_change=lambda: sizes.append(len(table.take_ended())), clock=clock)
    lease = table.grant([1], num_readers=1)
    table.end_read(lease.lease_id, "reader", 0)
    assert sizes == [0, 1]


def test_a_lease_that_nobody_needs_is_ended_whoever_has_read(table: LeaseTable, changes: Changes) -> None:
    lease = table.grant([1, 2], num_readers=3)
    table.end_read(lease.lease_id, "reader", 0)
    assert table.end(lease.lease_id)
    assert changes.num == 2
    assert not table.end(lease.lease_id)
    assert not table.end("no such lease")
    assert not table.end_read(lease.lease_id, "late reader", 0)
    assert [ended.block_ids for ended in table.take_ended()] == [(1, 2)]
    assert table.take_counts() == LeaseCounts(granted=1, released=1, expired=0)


def test_counts_are_taken_once(table: LeaseTable, clock: Clock) -> None:
    released = table.grant([1], num_readers=1)
    table.grant([2], num_readers=1)
    table.end_read(released.lease_id, "reader", 0)
    clock.now_s += LEASE_S
    table.expire()
    assert table.take_counts() == LeaseCounts(granted=2, released=1, expired=1)
    assert table.take_counts() == LeaseCounts()


def test_lease_ids_cannot_be_guessed(table: LeaseTable) -> None:
    ids = {table.grant([1], num_readers=1).lease_id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(lease_id) == 32 for lease_id in ids)


def test_a_lease_for_nobody_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Lease(lease_id="x", block_ids=(1,), num_reads=0, deadline=0.0)


def test_every_lease_ends_exactly_once_under_threads(clock: Clock, changes: Changes) -> None:
    """Granting, ending, expiring and taking back race; each block comes back once, and no valid read came after."""
    num_leases, num_readers, tp_size = 400, 2, 2
    table = table_of(clock, changes, tp_size=tp_size)
    granted: list[str] = []
    returned: list[int] = []
    done = threading.Event()

    def end_reads(seed: int) -> None:
        rng = random.Random(seed)
        while not done.is_set():
            if granted:
                table.end_read(rng.choice(granted), f"reader-{rng.randrange(num_readers)}", rng.randrange(tp_size))

    def expire() -> None:
        while not done.is_set():
            clock.now_s += LEASE_S / 50
            table.expire()
            table.seconds_to_expiry()

    def take_back() -> None:
        while not done.is_set():
            returned.extend(lease.block_ids[0] for lease in table.take_ended())

    def end() -> None:
        rng = random.Random(99)
        while not done.is_set():
            if granted:
                table.end(rng.choice(granted))

    threads = [threading.Thread(target=end)]
    threads += [threading.Thread(target=end_reads, args=(seed,)) for seed in range(3)]
    threads += [threading.Thread(target=expire), threading.Thread(target=take_back)]
    for thread in threads:
        thread.start()
    for block_id in range(num_leases):
        granted.append(table.grant([block_id], num_readers).lease_id)
    done.set()
    for thread in threads:
        thread.join(timeout=10)
    clock.now_s += LEASE_S
    table.expire()
    returned.extend(lease.block_ids[0] for lease in table.take_ended())
    assert sorted(returned) == list(range(num_leases))
    counts = table.take_counts()
    assert counts.granted == counts.released + counts.expired == num_leases
    assert len(table) == 0
