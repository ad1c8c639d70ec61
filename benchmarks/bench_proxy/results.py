"""What came out: every round's figures, their medians, and how they compare."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.bench_proxy.measure import Figures

BASE = "vllm-router"  # whom the others are compared with
OURS = "ours"


@dataclass
class Result:
    """A subject's figures in one pinning."""

    subject: str
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)

    def add(self, figures: Figures) -> None:
        for name, value in figures.items():
            self.rounds[name].append(value)

    def median(self, name: str) -> float | None:
        values = self.rounds.get(name)
        if not values:
            return None
        # Memory once taken is used again: only the first time does it grow.
        return max(values) if name.endswith("_rss_kb") else statistics.median(values)


Results = Mapping[str, Result]  # by subject


def add_latencies(results: Results) -> None:
    """From the latencies with and without a proxy, round by round, what the proxy adds."""
    direct = results.get("direct")
    for result in results.values():
        for percentile in ("p50", "p99"):
            alone = direct.rounds.get(f"latency_{percentile}_us", []) if direct else []
            with_it = result.rounds.get(f"latency_{percentile}_us", [])
            if result is not direct and alone and len(alone) == len(with_it):
                added = [b - a for a, b in zip(alone, with_it, strict=True)]
                result.rounds[f"added_{percentile}_us"] = added


@dataclass(frozen=True)
class Goal:
    """What issue and README promise of our proxy on one core."""

    figure: str
    text: str
    at_least: float | None = None  # times BASE's
    at_most: float | None = None  # times BASE's, or as it is
    is_ratio: bool = True

    def met(self, results: Results) -> bool | None:
        """None: it cannot be told."""
        value = ratio(results, self.figure) if self.is_ratio else _median(results, OURS, self.figure)
        if value is None:
            return None
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


GOALS = (
    Goal("whole_per_s", "at least 1.25", at_least=1.25),
    Goal("streamed_32_per_s", "at least 1.5", at_least=1.5),
    Goal("streamed_256_per_s", "at least 1.5", at_least=1.5),
    Goal("paced_cpu_us", "at most 1", at_most=1.0),
    Goal("paced_light_cpu_us", "at most 1", at_most=1.0),
    Goal("added_p50_us", "at most 500 µs", at_most=500.0, is_ratio=False),
)


def ratio(results: Results, figure: str, subject: str = OURS) -> float | None:
    """A subject's median over BASE's."""
    value, base = _median(results, subject, figure), _median(results, BASE, figure)
    return value / base if value is not None and base else None


def _median(results: Results, subject: str, figure: str) -> float | None:
    return results[subject].median(figure) if subject in results else None
