"""What was measured, and what follows from it."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.kv.cases import Case
from benchmarks.kv.contender import Contender
from benchmarks.kv.line_up import GOALS, SCATTERED_FACTOR
from benchmarks.kv.side import Timing


@dataclass
class Measured:
    """One case of one contender, over all rounds."""

    case: Case
    round_s: list[float] = field(default_factory=list)  # the median time of a read in each round
    num_reads: int = 0
    cpu_p_s: float = 0.0
    cpu_d_s: float = 0.0

    def add(self, timing: Timing) -> None:
        self.round_s.append(statistics.median(timing.seconds))
        self.num_reads += len(timing.seconds)
        self.cpu_p_s += timing.cpu_p_s
        self.cpu_d_s += timing.cpu_d_s

    @property
    def seconds(self) -> float:
        return statistics.median(self.round_s)

    @property
    def gb_per_s(self) -> float:
        return self.case.num_bytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> tuple[float, float]:
        """Of P and of D."""
        moved_gb = self.num_reads * self.case.num_bytes / 1e9
        return self.cpu_p_s / moved_gb, self.cpu_d_s / moved_gb


@dataclass
class Result:
    contender: Contender
    status: str = "ok"  # or "not installed", or "failed: ..."
    idle_cpu: float | None = None  # CPU seconds a second, of P and D together
    measured: dict[Case, Measured] = field(default_factory=dict)

    def add(self, case: Case, timing: Timing) -> None:
        self.measured.setdefault(case, Measured(case)).add(timing)


@dataclass(frozen=True)
class Verdict:
    """One goal in one case. `ratio` is the median over the rounds, in each of which both were measured in turn."""

    what: str
    case: Case
    ratio: float
    wanted: float

    @property
    def is_met(self) -> bool:
        return round(self.ratio, 2) >= self.wanted


def verdicts(results: Sequence[Result]) -> Iterator[Verdict]:
    """Every goal in every case in which its contenders were measured."""
    by_name = {result.contender.name: result.measured for result in results}
    for goal in GOALS:
        for case, ours in by_name.get(goal.ours, {}).items():
            ratios = {
                other: _ratio(ours, by_name[other][case]) for other in goal.others if case in by_name.get(other, {})
            }
            if ratios:
                best = min(ratios, key=lambda name: ratios[name])
                yield Verdict(
                    f"{goal.ours} / {best.split()[0] if len(goal.others) > 1 else best}",
                    case,
                    ratios[best],
                    goal.factor,
                )
    for result in results:
        if result.contender.family == "ours":
            contiguous = {case.num_bytes: measured for case, measured in result.measured.items() if not case.scattered}
            for case, measured in result.measured.items():
                if case.scattered and case.num_bytes in contiguous:
                    ratio = _ratio(measured, contiguous[case.num_bytes])
                    yield Verdict(f"{result.contender.name}, scattered / contiguous", case, ratio, SCATTERED_FACTOR)


def _ratio(ours: Measured, theirs: Measured) -> float:
    """How many times as fast."""
    return statistics.median(b / a for a, b in zip(ours.round_s, theirs.round_s, strict=False))
