"""Which CPU cores each engine computes on."""

from collections.abc import Sequence

Cores = tuple[int, ...]


def share_cores(cores: Cores, workers: Sequence[int]) -> list[tuple[Cores, ...]]:
    """Divides the machine's cores between engines, and an engine's between its workers (TP ranks).

    Every worker gets at least one core and neighbours get neighbouring cores. While there are enough cores nobody
    shares one and every worker gets as many as the next, give or take one; beyond that, cores are dealt in turn.

    Args:
        cores: the cores to divide, at least one.
        workers: per engine, its number of workers.

    Returns:
        Per engine, the cores of each worker.
    """
    total = sum(workers)
    if len(cores) >= total:
        shares = [_part(cores, i, total) for i in range(total)]
    elif len(cores) >= len(workers):  # engines stay apart, the workers of one engine share
        engines = [_part(cores, i, len(workers)) for i in range(len(workers))]
        shares = [share for own, num in zip(engines, workers, strict=True) for share in _deal(own, num)]
    else:
        shares = _deal(cores, total)
    iterator = iter(shares)
    return [tuple(next(iterator) for _ in range(num)) for num in workers]


def _part(cores: Cores, index: int, parts: int) -> Cores:
    return cores[index * len(cores) // parts : (index + 1) * len(cores) // parts]


def _deal(cores: Cores, num: int) -> list[Cores]:
    """`num` shares of these cores: parts where they suffice, else one core each in turn."""
    if len(cores) >= num:
        return [_part(cores, i, num) for i in range(num)]
    return [(cores[i % len(cores)],) for i in range(num)]


def omp_binding(workers: tuple[Cores, ...]) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: cores joined by ",", TP ranks by "|"."""
    return "|".join(",".join(map(str, cores)) for cores in workers)
