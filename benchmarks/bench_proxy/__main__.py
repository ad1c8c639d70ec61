"""The proxy's speed beside vllm-router, nginx as a plain reverse proxy, and no proxy: `make bench-proxy` (5 minutes).

Two instant stand-in engines (C), wrk and a load generator for streams. All subjects take turns case by case, so that
what else runs on the machine hits all alike. First each proxy is pinned to one core, with engines and load on another;
then all run free. Prints tables and the goals; writes JSON and a picture.
"""

import argparse
import json
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bench_proxy import plot, report
from benchmarks.bench_proxy.cases import Case, Latency, Throughput, make_cases
from benchmarks.bench_proxy.measure import is_possible
from benchmarks.bench_proxy.processes import BenchmarkError, build
from benchmarks.bench_proxy.results import Results
from benchmarks.bench_proxy.run import Plan, run
from benchmarks.bench_proxy.subjects import Direct, Nginx, Ours, Subject, VllmRouter, VllmRouterAsItIs

PINNINGS = ("pinned", "free")
_PINNED_S, _FREE_S = 160.0, 45.0  # then no other round begins: each takes a minute, or half of one
_QUIET_LOAD = 0.5
_OUTPUT = Path("logs/bench_proxy")


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as with Ctrl-C, leave nothing behind
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # 1000 streams have 2000 sockets in a proxy
    if options.load_average > _QUIET_LOAD:
        say(f"the machine is busy (load average {options.load_average:.1f}): trust the CPU times more than the rates")
    try:
        by_pinning = _run_all(options)
    except BenchmarkError as error:
        sys.exit(str(error))
    for pinning, results in by_pinning.items():
        print(f"\n{_describe(pinning)}\n")
        print("\n".join(report.table(results, vars(options))))
    about = {
        "load_average_before": options.load_average,
        "options": {name: str(value) for name, value in vars(options).items()},
        "versions": {subject.name: subject.version() for subject in _subjects(options)},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.as_json(by_pinning, about), indent=1) + "\n")
    options.png.parent.mkdir(parents=True, exist_ok=True)
    plot.draw(by_pinning, options.png)
    print(f"\nwritten: {options.json}, {options.png}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_proxy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [kind.name for kind in (Ours, VllmRouter, VllmRouterAsItIs, Nginx, Direct)]
    parser.add_argument("--json", type=Path, default=_OUTPUT / "bench_proxy.json", metavar="FILE")
    parser.add_argument("--png", type=Path, default=_OUTPUT / "bench_proxy.png", metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="some of: whole, streamed_32, streamed_256, paced …")
    parser.add_argument("--pinning", choices=[*PINNINGS, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=3, help="pinned; free, where less is measured, takes two thirds")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case in a round")
    parser.add_argument("--connections", dest="num_connections", type=int, default=32, help="of wrk")
    parser.add_argument("--streams", dest="num_streams", type=int, default=1000, help="paced ones at once")
    parser.add_argument(
        "--streams-light", dest="num_streams_light", type=int, default=250, help="so few that none lags"
    )
    parser.add_argument("--arguments", type=shlex.split, default=[], help="more of them for our proxy, as one word")
    parser.set_defaults(load_average=os.getloadavg()[0])
    return parser


def _subjects(options: argparse.Namespace) -> list[Subject]:
    everyone: list[Subject] = [Ours(options.arguments), VllmRouter(), VllmRouterAsItIs(), Nginx(), Direct()]
    subjects = []
    for subject in everyone:
        if subject.name not in options.only:
            continue
        if why := subject.missing():
            say(f"leaving out {subject.name}: {why}")
        else:
            subjects.append(subject)
    return subjects


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for case in make_cases(options.seconds, options.num_connections, options.num_streams, options.num_streams_light):
        if options.cases and case.name not in options.cases:
            continue
        if is_possible(case):
            cases.append(case)
        else:
            say(f"leaving out {case.name}: wrk is not installed: make system-deps")
    return cases


def _run_all(options: argparse.Namespace) -> dict[str, Results]:
    subjects, cases = _subjects(options), _cases(options)
    cores = sorted(os.sched_getaffinity(0))
    by_pinning: dict[str, Results] = {}
    with tempfile.TemporaryDirectory(prefix="bench_proxy_") as folder:
        engine, http_load = build(Path(folder))
        for pinning in PINNINGS if options.pinning == "both" else (options.pinning,):
            pinned = pinning == "pinned"
            plan = Plan(
                engine=engine,
                http_load=http_load,
                folder=Path(folder),
                proxy_cores=cores[:1] if pinned else cores,
                other_cores=cores[1:2] or cores if pinned else cores,
                num_rounds=options.rounds if pinned else max(2 * options.rounds // 3, 1),
                total_s=_PINNED_S if pinned else _FREE_S,
            )
            # Free, the paced streams would tell nothing new: it is what they cost that counts.
            some = cases if pinned else [case for case in cases if isinstance(case, Throughput | Latency)]
            started_s = time.monotonic()
            by_pinning[pinning] = run(subjects, some, plan, say)
            say(f"{pinning}: {time.monotonic() - started_s:.0f} s")
    return by_pinning


def _describe(pinning: str) -> str:
    if pinning == "pinned":
        return "PINNED: the proxy on one core, engines and load on another (direct: all but the proxy on that core)"
    return "FREE: proxy, engines and load share all cores"


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
