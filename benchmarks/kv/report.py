"""The results as text, as JSON and as a picture."""

import importlib.metadata
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kv.cases import BUFFER_BYTES, Case
from benchmarks.kv.results import Result, verdicts

_LIBRARIES = ("nixl", "mooncake-transfer-engine-non-cuda", "torch", "numpy")


def size_name(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def table(results: Sequence[Result]) -> Iterator[str]:
    """Lines: one block for each shape; speed, latency, CPU."""
    for scattered, title in ((False, "contiguous"), (True, "in pieces of 32 KiB that lie apart")):
        cases = [case for case in _cases(results) if case.scattered is scattered]
        if not cases:
            continue
        yield f"{title}: GB/s (µs per read)"
        heads = "".join(f"{size_name(case.num_bytes):>16}" for case in cases)
        yield f"{'':20}{heads}{'CPU s/GB P + D':>18}"
        for result in results:
            if result.measured:
                yield f"{result.contender.name:20}{''.join(_cell(result, case) for case in cases)}{_cpu(result, cases)}"
        yield ""
    yield "CPU while idle, of P and D together (cores):"
    idle = (f"{result.contender.name} {result.idle_cpu:.2f}" for result in results if result.idle_cpu is not None)
    yield "  " + ", ".join(idle)
    yield ""
    yield from (f"{r.contender.name}: {r.status}" for r in results if r.status != "ok")


def _cases(results: Sequence[Result]) -> list[Case]:
    cases = {case for result in results for case in result.measured}
    return sorted(cases, key=lambda case: (case.num_bytes, case.scattered))


def _cell(result: Result, case: Case) -> str:
    measured = result.measured.get(case)
    return f"{f'{measured.gb_per_s:.2f} ({measured.seconds * 1e6:.0f})' if measured else '-':>16}"


def _cpu(result: Result, cases: Sequence[Case]) -> str:
    measured = result.measured.get(cases[-1])
    return f"{'{:.2f} + {:.2f}'.format(*measured.cpu_s_per_gb) if measured else '-':>18}"


def summary(results: Sequence[Result]) -> Iterator[str]:
    """Lines: every goal, judged at the largest size; the other sizes beside it."""
    rows: dict[tuple[str, float], dict[Case, str]] = defaultdict(dict)
    judged: dict[tuple[str, float], list[str]] = defaultdict(list)
    for verdict in verdicts(results):
        row = verdict.what, verdict.wanted
        rows[row][verdict.case] = f"{verdict.ratio:.2f}"
        if verdict.case.num_bytes == BUFFER_BYTES:
            word = "met" if verdict.is_met else "MISSED"
            judged[row].append(f"{verdict.case.shape} {verdict.ratio:.2f} {word}")
    yield f"Goals, judged at {size_name(BUFFER_BYTES)}: ratios of speeds, medians over rounds in which both took turns"
    for (what, wanted), ratios in rows.items():
        yield f"{what} >= {wanted}: {', '.join(judged[what, wanted])}"
        smaller = [
            f"{size_name(case.num_bytes)} {case.shape} {ratios[case]}"
            for case in _cases(results)
            if case in ratios and case.num_bytes < BUFFER_BYTES
        ]
        yield f"    smaller: {', '.join(smaller)}"


def as_json(results: Sequence[Result], load: float) -> dict[str, Any]:
    """Args: load: of the machine before the run, in running processes."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "processor": _processor(),
            "num_cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
            "load_before": round(load, 2),
        },
        "contenders": [
            {
                "name": result.contender.name,
                "family": result.contender.family,
                "status": result.status,
                "memory": result.contender.memory_kind,
                "pinned": result.contender.is_pinned,
                "idle_cpu": None if result.idle_cpu is None else round(result.idle_cpu, 3),
                "cases": [
                    {
                        "num_bytes": case.num_bytes,
                        "shape": case.shape,
                        "gb_per_s": round(measured.gb_per_s, 3),
                        "latency_us": round(measured.seconds * 1e6, 1),
                        "cpu_s_per_gb_p": round(measured.cpu_s_per_gb[0], 3),
                        "cpu_s_per_gb_d": round(measured.cpu_s_per_gb[1], 3),
                        "fastest_round_us": round(min(measured.round_s) * 1e6, 1),
                        "slowest_round_us": round(max(measured.round_s) * 1e6, 1),
                        "num_rounds": len(measured.round_s),
                    }
                    for case, measured in result.measured.items()
                ],
            }
            for result in results
        ],
        "goals": [
            {
                "what": verdict.what,
                "num_bytes": verdict.case.num_bytes,
                "shape": verdict.case.shape,
                "ratio": round(verdict.ratio, 3),
                "wanted": verdict.wanted,
                "met": verdict.is_met,
            }
            for verdict in verdicts(results)
        ],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().split("\n")
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
