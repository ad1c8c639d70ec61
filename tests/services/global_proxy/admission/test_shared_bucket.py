"""One bucket of several workers behaves as one of a single worker: same answers, whoever asks."""

import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.global_proxy.admission.rate_limit import _Bucket
from services.global_proxy.admission.shared_bucket import SharedBucket
from services.global_proxy.membership.load_table import LoadTable

NUM_WORKERS = 4
BEGAN_S = 12_345_678.9  # 143 days after the machine's start


@pytest.fixture
def table() -> Iterator[LoadTable]:
    table = LoadTable.create(NUM_WORKERS, num_slots=1)
    yield table
    table.close()


def buckets_of(table: LoadTable, per_minute: int) -> list[SharedBucket]:
    """Each worker's end of one bucket."""
    buckets = []
    for worker in range(table.num_workers):
        shared = table.writer(worker).buckets
        assert shared is not None
        cells = shared.of(b"bucket")
        assert cells is not None
        buckets.append(SharedBucket(per_minute, cells, worker))
    return buckets


@pytest.mark.parametrize("per_minute", [7, 600, 1_000_000])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_as_one_bucket_in_one_process(table: LoadTable, per_minute: int, seed: int) -> None:
    """With bursts, hours without anything, workers that rarely look, tokens given back, and loans."""
    rng = random.Random(seed)
    now_s = BEGAN_S
    one = _Bucket(per_minute, now_s)
    shared = buckets_of(table, per_minute)
    num_refused = 0
    for _ in range(3000):
        now_s += rng.choice([0.0, 0.0, 0.01, 1.0, 20.0, 3600.0])
        amount = rng.choice([1, 1, 1, per_minute // 3, per_minute, 2 * per_minute])
        bucket = shared[min(int(rng.expovariate(1.0)), NUM_WORKERS - 1)]
        expected_s = one.wait_s(amount, now_s)
        assert bucket.wait_s(amount, now_s) == pytest.approx(expected_s, abs=1e-4)
        if expected_s > 1e-4:
            num_refused += 1
            continue
        one.take(amount)
        bucket.take(amount)
        if rng.random() < 0.3:
            back = rng.randrange(amount + 1)
            one.take(-back)
            bucket.take(-back)
    assert 300 < num_refused < 2700


def test_a_full_bucket_is_taken_whole_in_parts_that_are_not_round(table: LoadTable) -> None:
    shared = buckets_of(table, 10_007)
    for number in range(10_007):
        bucket = shared[number % NUM_WORKERS]
        assert bucket.wait_s(1, BEGAN_S) == 0.0
        bucket.take(1)
    assert [bucket.wait_s(1, BEGAN_S) > 0 for bucket in shared] == [True] * NUM_WORKERS


def test_a_worker_that_slept_through_the_others_burst_sees_it(table: LoadTable) -> None:
    sleeper, *others = buckets_of(table, 60)
    assert sleeper.wait_s(1, BEGAN_S) == 0.0
    now_s = BEGAN_S + 36_000
    for other in others:
        assert other.wait_s(20, now_s) == 0.0
        other.take(20)
    assert sleeper.wait_s(1, now_s) == pytest.approx(1.0)


TAKER = """
import sys
from services.global_proxy.admission.shared_bucket import SharedBucket
from services.global_proxy.membership.load_table import LoadTable
fd, worker, per_minute = map(int, sys.argv[1:])
bucket = SharedBucket(per_minute, LoadTable(fd).writer(worker).buckets.of(b"bucket"), worker)
num_taken = 0
print("ready", flush=True)
sys.stdin.readline()
while not bucket.wait_s(1, 1000.0):
    bucket.take(1)
    num_taken += 1
print(num_taken, flush=True)
"""


def test_processes_that_take_at_once_are_given_no_more_than_there_is(table: LoadTable) -> None:
    """But for the last one, which all may take who look at the same moment."""
    per_minute = 100_000
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, *map(str, (table.fd, worker, per_minute))],
            pass_fds=(table.fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for worker in range(NUM_WORKERS)
    ]
    try:
        for taker in takers:
            assert taker.stdout is not None
            assert taker.stdout.readline() == "ready\n"
        for taker in takers:
            assert taker.stdin is not None
            taker.stdin.write("go\n")
            taker.stdin.flush()
        num_taken = [int(taker.communicate(timeout=60)[0]) for taker in takers]
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()
    assert table.writer(0).buckets.of(b"bucket").tolist()[:NUM_WORKERS] == num_taken  # type: ignore[union-attr]
    assert per_minute <= sum(num_taken) < per_minute + NUM_WORKERS
    debt = sum(num_taken) - per_minute
    assert [round(bucket.wait_s(1, 1000.0) * per_minute / 60) for bucket in buckets_of(table, per_minute)] == [
        debt + 1
    ] * NUM_WORKERS
