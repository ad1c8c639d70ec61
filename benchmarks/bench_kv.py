"""How fast KV bytes move from one process into another: `make bench-kv` (about 5 minutes; --quick: less than one).

Every transport of ours beside memcpy, raw sockets, NIXL and Mooncake: two processes for each, P on one CPU and D on the
other, which take turns case by case, so that what else runs on the machine hits all alike. Idle pairs are stopped, for
some of them never sleep. Prints a table and the goals; writes bench_kv.json and bench_kv.png.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from benchmarks.kv import plot, report
from benchmarks.kv.cases import CASES, QUICK_CASES, Case
from benchmarks.kv.contender import Contender
from benchmarks.kv.line_up import CONTENDERS
from benchmarks.kv.pair import Pair, PairError
from benchmarks.kv.results import Result


@dataclass(frozen=True)
class Effort:
    cases: Sequence[Case]
    num_rounds: int
    total_s: float  # after so many seconds no other round begins
    case_s: float  # of a contender in a round
    idle_s: float


_FULL = Effort(CASES, num_rounds=15, total_s=270.0, case_s=0.2, idle_s=1.0)
_QUICK = Effort(QUICK_CASES, num_rounds=3, total_s=30.0, case_s=0.1, idle_s=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("logs/bench_kv"), help="folder for the JSON and the plot")
    parser.add_argument("--rounds", type=int, help="default 15, or 3 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and rounds: shows that all work, not how fast"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {', '.join(c.name for c in CONTENDERS)}")
    options = parser.parse_args()
    contenders = [c for c in CONTENDERS if options.only is None or c.name in options.only]
    if options.only is not None and len(contenders) < len(options.only):
        parser.error(f"--only: the names are {', '.join(c.name for c in CONTENDERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as with Ctrl-C, leave nothing behind
    load = os.getloadavg()[0]
    effort = _QUICK if options.quick else _FULL
    if options.rounds:
        effort = replace(effort, num_rounds=options.rounds)
    results = run(contenders, effort)
    print("\n".join([*report.table(results), "", *report.summary(results)]))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench_kv.json").write_text(json.dumps(report.as_json(results, load), indent=1) + "\n")
    plot.draw(results, options.output / "bench_kv.png")
    print(f"\nwritten: {options.output}/bench_kv.json, {options.output}/bench_kv.png")


def run(contenders: Sequence[Contender], effort: Effort) -> list[Result]:
    """Measure them all, in turns. A contender that fails ends; the others go on."""
    results = [Result(contender) for contender in contenders]
    latest = time.monotonic() + effort.total_s
    with tempfile.TemporaryDirectory(prefix="bench_kv_") as folder, contextlib.ExitStack() as stack:
        pairs: list[tuple[Pair, Result]] = []
        for result in results:
            if not all(_is_installed(module) for module in result.contender.needs):
                result.status = "not installed"
                continue
            _say(f"starting {result.contender.name}")
            pair = Pair(result.contender, _cpus(result.contender), Path(folder))
            stack.callback(pair.close)
            with _failure_noted(result):
                pair.start(effort.cases)
                pairs.append((pair, result))
        for number in range(effort.num_rounds):
            if number and time.monotonic() > latest:
                _say("no time for more rounds: the machine is busy")
                break
            _say(f"round {number + 1} of {effort.num_rounds}")
            for _, of_one_size in groupby(effort.cases, key=lambda case: case.num_bytes):
                group = list(of_one_size)
                for pair, result in _rotated(pairs, number):
                    with _failure_noted(result):
                        for case in group:
                            result.add(case, pair.time(case, effort.case_s))
        _say("idle")
        for pair, result in pairs:
            if result.status == "ok":
                result.idle_cpu = pair.idle_cpu(effort.idle_s)
    return results


@contextlib.contextmanager
def _failure_noted(result: Result) -> Iterator[None]:
    try:
        yield
    except PairError as error:
        result.status = f"failed: {error}"


def _rotated(pairs: Sequence[tuple[Pair, Result]], number: int) -> list[tuple[Pair, Result]]:
    """Those that have not failed; in each round another goes first."""
    alive = [(pair, result) for pair, result in pairs if result.status == "ok"]
    start = number % max(len(alive), 1)
    return alive[start:] + alive[:start]


def _cpus(contender: Contender) -> Sequence[int | None]:
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[:2] if contender.is_pinned and len(cpus) > 1 else (None, None)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
