"""Sharing cores: the example cases, and what must hold for any numbers."""

import pytest

from omni.deployment.cores import omp_binding, share_cores


@pytest.mark.parametrize(
    ("num_cores", "workers", "shares"),
    [
        (2, [1, 1], [((0,),), ((1,),)]),
        (5, [1, 1], [((0, 1),), ((2, 3, 4),)]),
        (4, [2, 1], [((0,), (1,)), ((2, 3),)]),
        (2, [2, 1], [((0,), (0,)), ((1,),)]),
        (3, [2, 2], [((0,), (0,)), ((1,), (2,))]),
        (2, [1, 1, 1], [((0,),), ((1,),), ((0,),)]),
        (4, [4, 1], [((0,), (1,), (0,), (1,)), ((2, 3),)]),
        (1, [2, 1], [((0,), (0,)), ((0,),)]),
    ],
)
def test_shares(num_cores: int, workers: list[int], shares: object) -> None:
    assert share_cores(tuple(range(num_cores)), workers) == shares


@pytest.mark.parametrize("num_cores", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("workers", [[1], [1, 1], [2, 1, 1], [4, 4], [1] * 9, [3, 1, 2]])
def test_any_numbers(num_cores: int, workers: list[int]) -> None:
    cores = tuple(range(10, 10 + num_cores))
    shares = share_cores(cores, workers)
    assert [len(engine) for engine in shares] == workers
    flat = [core for engine in shares for worker in engine for core in worker]
    assert set(flat) <= set(cores)
    for engine in shares:
        for worker in engine:
            assert worker, "a worker without a core"
            assert list(worker) == list(range(worker[0], worker[0] + len(worker))), "cores that are not neighbours"
    if num_cores >= sum(workers):
        assert sorted(flat) == list(cores), "every core is used once"
    else:
        counts = [flat.count(core) for core in cores]
        assert min(counts) >= 1, "an idle core while others are shared"


def test_binding() -> None:
    assert omp_binding(((0,),)) == "0"
    assert omp_binding(((0, 1), (2, 3))) == "0,1|2,3"
