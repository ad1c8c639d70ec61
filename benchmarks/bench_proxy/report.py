"""The results as a table and as JSON."""

import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.bench_proxy.results import BASE, GOALS, OURS, Results, ratio

_ROWS = (  # figure, what it is, decimals
    ("whole_per_s", "whole: requests/s", 0),
    ("whole_cpu_us", "    proxy's CPU a request, µs", 0),
    ("whole_cores", "    cores the proxy kept busy", 2),
    ("streamed_32_per_s", "32 chunks: requests/s", 0),
    ("streamed_32_cpu_us", "    proxy's CPU a request, µs", 0),
    ("streamed_32_cores", "    cores the proxy kept busy", 2),
    ("streamed_256_per_s", "256 chunks: requests/s", 0),
    ("streamed_256_cpu_us", "    proxy's CPU a request, µs", 0),
    ("streamed_256_cores", "    cores the proxy kept busy", 2),
    ("paced_share_in_time", "{num_streams} paced streams: chunks of those due", 2),
    ("paced_spacing_p50_ms", "    spacing p50, ms (20 sent)", 1),
    ("paced_spacing_p99_ms", "    spacing p99, ms", 1),
    ("paced_cpu_us", "    proxy's CPU a chunk, µs", 1),
    ("paced_cores", "    cores the proxy kept busy", 2),
    ("paced_rss_kb", "    memory a stream, KB", 1),
    ("paced_light_share_in_time", "{num_streams_light} paced streams: chunks of those due", 2),
    ("paced_light_spacing_p50_ms", "    spacing p50, ms (20 sent)", 1),
    ("paced_light_spacing_p99_ms", "    spacing p99, ms", 1),
    ("paced_light_cpu_us", "    proxy's CPU a chunk, µs", 1),
    ("paced_light_cores", "    cores the proxy kept busy", 2),
    ("latency_p50_us", "one at a time: latency p50, µs", 0),
    ("latency_p99_us", "    latency p99, µs", 0),
    ("added_p50_us", "    added to direct, p50, µs", 0),
    ("added_p99_us", "    added to direct, p99, µs", 0),
)
_WIDTH = 13


def table(results: Results, words: Mapping[str, object]) -> Iterator[str]:
    """One line per figure that anyone has: medians over the rounds, ours over vllm-router's, and the goal.

    Args:
        words: for the rows' names: num_streams, num_streams_light.
    """
    goals = {goal.figure: goal for goal in GOALS}
    yield f"{'':46}" + "".join(f"{name:>{_WIDTH}}" for name in results) + f"{f'ours/{BASE}':>18}  goal"
    for figure, what, num_decimals in _ROWS:
        medians = [result.median(figure) for result in results.values()]
        if all(median is None for median in medians):
            continue
        cells = "".join(_cell(median, num_decimals) for median in medians)
        ours = ratio(results, figure)
        line = f"{what.format(**words):46}{cells}{'' if ours is None else f'{ours:.2f}':>18}"
        if figure in goals:
            verdict = {True: "met", False: "MISSED", None: "not told"}[goals[figure].met(results)]
            line += f"  {goals[figure].text}: {verdict}"
        yield line.rstrip()
    for result in results.values():
        yield from (f"{result.subject}: {failure}" for failure in result.failures)


def _cell(median: float | None, num_decimals: int) -> str:
    return f"{'' if median is None else f'{median:.{num_decimals}f}':>{_WIDTH}}"


def as_json(by_pinning: Mapping[str, Results], about: Mapping[str, Any]) -> dict[str, Any]:
    """Every round's figures, the medians and the ratios to vllm-router; `about`: how they were made."""
    return {
        "about": {"machine": platform.processor() or platform.machine(), "num_cores": os.cpu_count(), **about},
        "results": {
            pinning: {
                subject: {
                    "medians": {name: result.median(name) for name in result.rounds},
                    "rounds": dict(result.rounds),
                    f"over_{BASE}": {name: ratio(results, name, subject) for name in result.rounds},
                    "failures": result.failures,
                }
                for subject, result in results.items()
            }
            for pinning, results in by_pinning.items()
        },
        "goals": [
            {"figure": goal.figure, "goal": goal.text, "met": goal.met(by_pinning["pinned"]), "of": OURS}
            for goal in GOALS
            if "pinned" in by_pinning
        ],
    }
