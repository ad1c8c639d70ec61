"""Counts are exact although nobody locks, and go with the process that made them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import LoadReport
from tests.services.global_proxy.membership.conftest import until

NUM_SLOTS = 5
NUM_ROUNDS = 20_000

# Many small changes to all slots that leave slot s with s + 1 requests of 10 tokens each; then sleeps if told to.
HAMMER = """
import sys
from services.global_proxy.membership.load_table import LoadTable
fd, worker, num_rounds, num_slots = map(int, sys.argv[1:])
writer = LoadTable(fd).writer(worker)
for round in range(num_rounds):
    for slot in range(num_slots):
        writer.add(slot, 1, 10)
        writer.add_in_flight(1)
        if round > slot:
            writer.add(slot, -1, -10)
            writer.add_in_flight(-1)
print("done", flush=True)
sys.stdin.read()
"""


@contextmanager
def hammering(table: LoadTable) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, *map(str, (table.fd, worker, NUM_ROUNDS, NUM_SLOTS))],
            pass_fds=(table.fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(table.num_workers)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until_done(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"


def test_sums_are_exact_and_a_killed_workers_counts_vanish() -> None:
    table = LoadTable.create(num_workers=4, num_slots=8)
    with hammering(table) as processes:
        for process in processes:
            wait_until_done(process)
        expected = [4 * (slot + 1) for slot in range(NUM_SLOTS)]
        assert [table.requests(slot) for slot in range(NUM_SLOTS)] == expected
        assert [table.tokens(slot) for slot in range(NUM_SLOTS)] == [10 * count for count in expected]
        assert table.num_in_flight() == sum(expected)
        assert table.requests(NUM_SLOTS) == 0

        os.kill(processes[1].pid, signal.SIGKILL)
        processes[1].wait(timeout=20)
        table.clear_worker(1)
        expected = [3 * (slot + 1) for slot in range(NUM_SLOTS)]
        assert [table.requests(slot) for slot in range(NUM_SLOTS)] == expected
        assert [table.tokens(slot) for slot in range(NUM_SLOTS)] == [10 * count for count in expected]
        assert table.num_in_flight() == sum(expected)
    table.close()


async def test_a_reader_never_sees_more_than_there_is() -> None:
    """While four write: each worker has at most slot + 2 requests at an instance, and never fewer than none."""
    table = LoadTable.create(num_workers=4, num_slots=NUM_SLOTS)
    with hammering(table) as processes:
        await until(lambda: table.requests(NUM_SLOTS - 1) > 0)
        seen = [table.requests(slot) for _ in range(2000) for slot in range(NUM_SLOTS)]
        assert all(0 <= count <= 4 * (index % NUM_SLOTS + 2) for index, count in enumerate(seen))
        for process in processes:
            wait_until_done(process)
    table.close()


def test_one_worker_reads_what_it_wrote() -> None:
    table = LoadTable.create()
    writer = table.writer(0)
    writer.add(1023, 2, 300)
    writer.add_queued(3)
    writer.add_in_flight(1)
    assert (table.requests(1023), table.tokens(1023), table.num_queued(), table.num_in_flight()) == (2, 300, 3, 1)
    assert table.requests(1022) == 0
    table.close()


def test_who_has_accepted_more_than_another_is_ahead() -> None:
    table = LoadTable.create(num_workers=3)
    writers = [table.writer(worker) for worker in range(3)]
    assert [table.is_ahead(worker) for worker in range(3)] == [False, False, False]
    writers[1].add_connections(1)
    writers[2].add_connections(2)
    writers[2].add_leases(1, 3)
    writers[2].add_turn("decode")
    assert (table.leases(1), table.turns("prefill"), table.turns("decode")) == (3, 0, 1)
    assert [table.is_ahead(worker) for worker in range(3)] == [False, True, True]
    writers[0].add_connections(1)
    assert [table.is_ahead(worker) for worker in range(3)] == [False, False, True]
    table.clear_worker(2)
    assert [table.is_ahead(worker) for worker in range(3)] == [True, True, False]
    assert table.num_in_flight() == table.num_queued() == table.leases(1) == table.turns("decode") == 0
    table.close()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_the_newest_verdict_holds_whoever_gave_it() -> None:
    clock = Clock()
    table = LoadTable.create(num_workers=3, num_slots=2, now_s=clock)
    first, second = table.writer(0), table.writer(1)
    assert not table.is_down(0)
    first.set_down(0, 5.0)
    assert table.is_down(0)
    assert table.down_until_s(0) == pytest.approx(1005.0)
    assert table.down_until_s(1) == 0.0
    clock.now_s += 1
    second.set_up(0)
    assert not table.is_down(0)
    assert table.down_until_s(0) == 0.0
    clock.now_s += 1
    first.set_down(0, 1e9)
    clock.now_s += 1
    second.set_down(0, 2.0)
    clock.now_s += 1.9
    assert table.is_down(0)
    clock.now_s += 0.2
    assert not table.is_down(0)
    assert not table.is_down(1)
    table.close()


def test_a_dead_workers_verdicts_stay() -> None:
    clock = Clock()
    table = LoadTable.create(num_workers=2, num_slots=2, now_s=clock)
    table.writer(1).set_down(0, 5.0)
    table.clear_worker(1)
    assert table.is_down(0)
    table.close()


def test_the_next_instance_of_a_slot_begins_as_up() -> None:
    table = LoadTable.create(num_workers=2, num_slots=2, now_s=Clock())
    table.writer(1).set_down(0, 5.0)
    table.forget_verdicts(0)  # in the same millisecond
    assert not table.is_down(0)
    table.close()


def test_reports() -> None:
    table = LoadTable.create(num_slots=2)
    report = LoadReport(num_running=1, num_waiting=2, kv_used_tokens=3, kv_total_tokens=4, at_s=5.5)
    assert table.report(1) is None
    table.set_report(1, report)
    assert table.report(1) == report
    assert table.report(0) is None
    table.clear_report(1)
    assert table.report(1) is None
    table.close()


def test_wrong_sizes_and_a_strange_descriptor() -> None:
    with pytest.raises(ValueError, match="num_workers: must be 1 or more, got 0"):
        LoadTable.create(0)
    fd = os.memfd_create("strange")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="is no load table"):
        LoadTable(fd)
    os.close(fd)
