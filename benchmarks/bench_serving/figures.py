"""What is counted of the outcomes: percentiles, goodput, CPU per token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.bench_serving.client import UNFINISHED, Outcome
from benchmarks.bench_serving.trace import KINDS, Kind

Figures = dict[str, float | None]  # None: nothing to count
OTHER_FACTORS = (3.0, 10.0)  # bounds beside the stated ones, to see how much hangs on their choice


@dataclass(frozen=True)
class Unloaded:
    """Medians of one plain server that serves one request at a time, nothing else running; seconds."""

    ttft_s: Mapping[Kind, float]
    e2e_s: Mapping[Kind, float]
    itl_s: float  # a chat's mean gap: single gaps say little where tokens come in bursts


@dataclass(frozen=True)
class Slo:
    """What a good answer keeps."""

    ttft_s: Mapping[Kind, float]  # at most
    itl_s: float  # p99 of the answer's own gaps, at most

    @classmethod
    def of(cls, unloaded: Unloaded, ttft_factor: float, itl_factor: float) -> "Slo":
        ttft_s = {kind: ttft_factor * unloaded.ttft_s[kind] for kind in KINDS}
        return cls(ttft_s, itl_factor * unloaded.itl_s)

    def is_met_by(self, outcome: Outcome) -> bool:
        if outcome.error is not None or outcome.ttft_s is None:
            return False
        itl_s = percentile(outcome.gaps_s, 99) or 0.0
        return outcome.ttft_s <= self.ttft_s[outcome.kind] and itl_s <= self.itl_s


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Interpolated between the two nearest values; None if there are none."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latencies(outcomes: Sequence[Outcome]) -> Figures:
    """p50 and p99 of TTFT, ITL and E2E of each kind, ms.

    What was not finished counts with the time it had taken when it was cut off, so its figures are lower bounds. What
    failed is left out; see num_failed.
    """
    figures: Figures = {}
    for kind in KINDS:
        some = [outcome for outcome in outcomes if outcome.kind == kind and not outcome.is_failed]
        times_s = {
            "ttft": [outcome.e2e_s if outcome.ttft_s is None else outcome.ttft_s for outcome in some],
            "itl": [gap_s for outcome in some for gap_s in outcome.gaps_s],
            "e2e": [outcome.e2e_s for outcome in some],
        }
        for name, values in times_s.items():
            for percent in (50, 99):
                value_s = percentile(values, percent)
                figures[f"{kind}_{name}_p{percent}_ms"] = None if value_s is None else 1000 * value_s
    return figures


def goodput(outcomes: Sequence[Outcome], slo: Slo, duration_s: float) -> Figures:
    """Requests within the bounds, per second of arrivals, and as a share of all that arrived."""
    figures: Figures = {}
    for name, some in _by_name(outcomes).items():
        num_good = sum(slo.is_met_by(outcome) for outcome in some)
        figures[f"{name}goodput_per_s"] = num_good / duration_s
        figures[f"{name}good_share"] = num_good / len(some) if some else None
    return figures


def counts(outcomes: Sequence[Outcome]) -> Figures:
    """Requests and tokens, and how late the client was."""
    figures: Figures = {"num_tokens": sum(outcome.num_tokens for outcome in outcomes)}
    for name, some in _by_name(outcomes).items():
        figures[f"{name}num_requests"] = len(some)
        figures[f"{name}num_unfinished"] = sum(outcome.error == UNFINISHED for outcome in some)
        figures[f"{name}num_failed"] = sum(outcome.is_failed for outcome in some)
    late_s = percentile([outcome.late_s for outcome in outcomes], 99)
    figures["client_late_p99_ms"] = None if late_s is None else 1000 * late_s
    return figures


def cpu_figures(cpu_s: float, wall_s: float, outcomes: Sequence[Outcome]) -> Figures:
    """What the engines and the proxy used, from the trace's start until the last answer."""
    num_generated = sum(outcome.num_tokens for outcome in outcomes)
    num_served = num_generated + sum(outcome.num_prompt_tokens for outcome in outcomes)  # counted in whole answers
    return {
        "cores_busy": cpu_s / wall_s,
        "cpu_s_per_1000_tokens": 1000 * cpu_s / num_generated if num_generated else None,
        "cpu_s_per_1000_tokens_with_prompts": 1000 * cpu_s / num_served if num_served else None,
    }


def unloaded_of(outcomes: Sequence[Outcome]) -> Unloaded:
    """Medians of requests that were sent one at a time.

    Raises:
        ValueError: one was not answered.
    """
    for outcome in outcomes:
        if outcome.error is not None:
            raise ValueError(f"a {outcome.kind} request on its own: {outcome.error}")
    figures = latencies(outcomes)
    ttft_s = {kind: (figures[f"{kind}_ttft_p50_ms"] or 0.0) / 1000 for kind in KINDS}
    e2e_s = {kind: (figures[f"{kind}_e2e_p50_ms"] or 0.0) / 1000 for kind in KINDS}
    gaps_s = [fmean(outcome.gaps_s) for outcome in outcomes if outcome.kind == "chat" and outcome.gaps_s]
    return Unloaded(ttft_s, e2e_s, percentile(gaps_s, 50) or 0.0)


def _by_name(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    kinds = {f"{kind}_": [outcome for outcome in outcomes if outcome.kind == kind] for kind in KINDS}
    return {"": list(outcomes), **kinds}
