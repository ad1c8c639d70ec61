"""The results as tables and as JSON."""

import operator
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.bench_serving import figures
from benchmarks.bench_serving.figures import OTHER_FACTORS, Slo, Unloaded
from benchmarks.bench_serving.run import LoadResult, Results, SystemResult

OURS, PLAIN, NIXL = "ours", "plain", "nixl"
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {"≤": operator.le, "≥": operator.ge}
_WIDTH = 14
_ROWS = (  # figure, what it is, decimals, whether less is better (None: it is no merit)
    ("chat_ttft_p50_ms", "chats: TTFT p50, ms", 0, True),
    ("chat_ttft_p99_ms", "    TTFT p99, ms", 0, True),
    ("chat_itl_p50_ms", "    ITL p50, ms", 1, True),
    ("chat_itl_p99_ms", "    ITL p99, ms", 1, True),
    ("chat_e2e_p50_ms", "    E2E p50, ms", 0, True),
    ("chat_e2e_p99_ms", "    E2E p99, ms", 0, True),
    ("long_ttft_p50_ms", "long prompts: TTFT p50, ms", 0, True),
    ("long_ttft_p99_ms", "    TTFT p99, ms", 0, True),
    ("long_itl_p50_ms", "    ITL p50, ms", 1, True),
    ("long_itl_p99_ms", "    ITL p99, ms", 1, True),
    ("long_e2e_p50_ms", "    E2E p50, ms", 0, True),
    ("long_e2e_p99_ms", "    E2E p99, ms", 0, True),
    ("goodput_per_s", "goodput: requests/s within the bounds", 3, False),
    ("good_share", "    share of all requests", 3, False),
    ("chat_good_share", "    share of the chats", 3, False),
    ("long_good_share", "    share of the long prompts", 3, False),
    ("cpu_s_per_1000_tokens", "CPU s per 1000 generated tokens", 1, True),
    ("cpu_s_per_1000_tokens_with_prompts", "    per 1000 tokens, prompts' too", 2, True),
    ("cores_busy", "    cores busy", 2, None),
    ("num_requests", "requests", 0, None),
    ("num_unfinished", "    cut off unfinished", 0, True),
    ("num_failed", "    failed", 0, True),
    ("client_late_p99_ms", "client was late to send, p99, ms", 1, None),
)


@dataclass(frozen=True)
class Goal:
    """A figure of ours beside another system's, at one load."""

    load: str
    figure: str
    other: str
    sign: str  # a key of _SIGNS
    bound: float  # of the ratio

    @property
    def text(self) -> str:
        return f"{self.load}: {self.figure}, ours {self.sign} {self.bound:g} of {self.other}"

    def ratio(self, results: Results) -> float | None:
        return _ratio(results, self.load, self.figure, OURS, self.other)

    def met(self, results: Results) -> bool | None:
        """None: not told."""
        ratio = self.ratio(results)
        return None if ratio is None else _SIGNS[self.sign](ratio, self.bound)


def goals(results: Results) -> list[Goal]:
    """p99 ITL of chats and goodput beside plain servers."""
    return [
        goal
        for load in results.loads
        for goal in (
            Goal(load.name, "chat_itl_p99_ms", PLAIN, "≤", 0.3),
            Goal(load.name, "goodput_per_s", PLAIN, "≥", 1.5),
        )
    ]


def tables(results: Results) -> Iterator[str]:
    """Lines: a table for each load, idle CPU, the goals, and who is better where."""
    yield from _about(results)
    for load in results.loads:
        systems = {name: of.loads[load.name] for name, of in results.systems.items() if load.name in of.loads}
        yield ""
        yield (
            f"{load.name.upper()}: {load.chats_per_s:.2f} chats/s and {load.longs_per_s:.2f} long prompts/s "
            f"for {load.duration_s:.0f} s"
        )
        yield f"{'':44}" + "".join(f"{name:>{_WIDTH}}" for name in systems)
        for figure, what, num_decimals, _ in _ROWS:
            values = [result.figures.get(figure) for result in systems.values()]
            yield f"{what:44}" + "".join(_cell(value, num_decimals) for value in values)
        if results.unloaded is not None:
            for factor in OTHER_FACTORS:
                values = [_goodput(result, results.unloaded, factor) for result in systems.values()]
                yield f"{f'goodput with bounds {factor:g} times the unloaded':44}" + "".join(
                    _cell(v, 3) for v in values
                )
        yield from _failed_requests(systems)
    yield from _verdicts(results)


def _about(results: Results) -> Iterator[str]:
    for name, system in results.systems.items():
        started = "did not start" if system.start_s is None else f"started in {system.start_s:.0f} s"
        idle = "" if system.idle_cores is None else f", idle: {100 * system.idle_cores:.1f} % of a core"
        yield f"{name:>{_WIDTH}}: {system.title}; {started}{idle}"
        yield from (f"{'':{_WIDTH}}  FAILED: {failure}" for failure in system.failures)
    if results.unloaded is not None and results.slo is not None:
        unloaded, slo = results.unloaded, results.slo
        yield (
            f"one plain server, unloaded, medians: TTFT {1000 * unloaded.ttft_s['chat']:.0f} ms (chat), "
            f"{1000 * unloaded.ttft_s['long']:.0f} ms (long), ITL {1000 * unloaded.itl_s:.1f} ms, "
            f"E2E {1000 * unloaded.e2e_s['chat']:.0f} and {1000 * unloaded.e2e_s['long']:.0f} ms"
        )
        yield (
            f"within the bounds: TTFT ≤ {1000 * slo.ttft_s['chat']:.0f} ms (chat), "
            f"≤ {1000 * slo.ttft_s['long']:.0f} ms (long), p99 of the answer's ITL ≤ {1000 * slo.itl_s:.0f} ms"
        )


def _verdicts(results: Results) -> Iterator[str]:
    yield ""
    for goal in goals(results):
        verdict = {True: "met", False: "MISSED", None: "not told"}[goal.met(results)]
        ratio = goal.ratio(results)
        yield f"goal, {goal.text}: {'' if ratio is None else f'{ratio:.2f} of it, '}{verdict}"
    for other, words in ((PLAIN, "WHERE PLAIN SERVERS WIN"), (NIXL, "WHERE NIXL WITH VLLM-ROUTER WINS")):
        if OURS not in results.systems or other not in results.systems:
            continue
        yield ""
        yield f"{words} (it / ours):"
        found = list(_wins(results, other))
        yield from found or ["  nowhere"]


def _wins(results: Results, other: str) -> Iterator[str]:
    for load in results.loads:
        pair = [results.systems[name].loads.get(load.name) for name in (other, OURS)]
        if pair[0] is None or pair[1] is None:
            continue
        for figure, theirs, ours in better(pair[0], pair[1]):
            yield f"  {load.name}: {figure} {theirs:.4g} / {ours:.4g}"
    theirs_idle, ours_idle = results.systems[other].idle_cores, results.systems[OURS].idle_cores
    if theirs_idle is not None and ours_idle is not None and theirs_idle < ours_idle:
        yield f"  idle: cores {theirs_idle:.3f} / {ours_idle:.3f}"


def better(one: LoadResult, other: LoadResult) -> Iterator[tuple[str, float, float]]:
    """In which figures `one` is better: name, its value, the other's."""
    for figure, _, _, less_is_better in _ROWS:
        mine, theirs = one.figures.get(figure), other.figures.get(figure)
        if less_is_better is None or mine is None or theirs is None:
            continue
        if (mine < theirs) if less_is_better else (mine > theirs):
            yield figure, mine, theirs


def as_json(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, every request's times too: other bounds can be tried without another run."""
    return {
        "about": {"machine": platform.processor() or platform.machine(), "num_cores": os.cpu_count(), **about},
        "is_complete": results.is_complete,
        "unloaded_plain": None if results.unloaded is None else asdict(results.unloaded),
        "slo": None if results.slo is None else asdict(results.slo),
        "loads": [asdict(load) for load in results.loads],
        "systems": {name: _system_as_json(system) for name, system in results.systems.items()},
        "goals": [
            {"goal": goal.text, "ratio": goal.ratio(results), "met": goal.met(results)} for goal in goals(results)
        ],
    }


def _system_as_json(system: SystemResult) -> dict[str, Any]:
    return {
        "title": system.title,
        "start_s": system.start_s,
        "idle_cores": system.idle_cores,
        "failures": system.failures,
        "loads": {
            name: {"figures": result.figures, "requests": [_rounded(asdict(outcome)) for outcome in result.outcomes]}
            for name, result in system.loads.items()
        },
    }


def _rounded(value: Any) -> Any:
    """To 10 µs, or the file would be mostly digits that mean nothing."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _goodput(result: LoadResult, unloaded: Unloaded, factor: float) -> float | None:
    return figures.goodput(result.outcomes, Slo.of(unloaded, factor, factor), result.load.duration_s)["goodput_per_s"]


def _failed_requests(systems: Mapping[str, LoadResult]) -> Iterator[str]:
    for name, result in systems.items():
        errors = [outcome.error for outcome in result.outcomes if outcome.is_failed]
        if errors:
            yield f"{name}: {len(errors)} requests failed, the first with {errors[0]}"


def _ratio(results: Results, load: str, figure: str, one: str, other: str) -> float | None:
    pair = []
    for name in (one, other):
        result = results.systems[name].loads.get(load) if name in results.systems else None
        pair.append(None if result is None else result.figures.get(figure))
    return pair[0] / pair[1] if pair[0] is not None and pair[1] else None


def _cell(value: float | None, num_decimals: int) -> str:
    return f"{'' if value is None else f'{value:.{num_decimals}f}':>{_WIDTH}}"
