"""Which policy should choose P and D? The real policies on simulated engines: `python -m benchmarks.simulate_policies`.

Each policy serves the same trace (about two minutes in all): bursty arrivals, log-normal lengths, with and without
shared prefixes, on 1 to 64 prefill and decode instances, and where every fourth is half as fast. Policies for one role
are compared while the other has its default. Prints tables; writes simulate_policies.json and simulate_policies.png.

What is not simulated: preemption, failures, prefix caches on D, several proxies, loads that are told late.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from benchmarks.simulation.report import Row, as_json, draw, table
from benchmarks.simulation.run import Case, Outcome, Simulation, rate_at
from benchmarks.simulation.trace import Shape, make_trace
from services.global_proxy.policies.base import Role
from services.global_proxy.policies.registry import policy_names

_DEFAULTS: dict[Role, str] = {"prefill": "prefix_aware", "decode": "pd_score_balance"}
_SIZES = (1, 4, 16, 64)
_MIXED_SIZE = 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    rows = [row for case in _cases(options) for row in compare(case, options.load, options.requests, options.seed)]
    print("\n".join(table(rows)))
    options.output.mkdir(parents=True, exist_ok=True)
    data = as_json(rows, options.load, options.seed)
    (options.output / "simulate_policies.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(rows, options.output / "simulate_policies.png")
    print(f"\nwritten: {options.output}/simulate_policies.json, {options.output}/simulate_policies.png")


def compare(case: Case, load: float, num_requests: int | None, seed: int) -> Iterator[Row]:
    """Every policy of either role on the same trace. A single instance leaves no choice, so one row says all."""
    if num_requests is None:
        num_requests = 2000 + 400 * case.num_prefill
    trace = make_trace(case.shape, num_requests, rate_at(load, case), seed)
    print(f"{case}: {len(trace)} requests in {trace[-1].at_s:.0f} s", file=sys.stderr, flush=True)

    def serve(names: Mapping[Role, str]) -> Outcome:
        random.seed(seed)  # for power_of_two
        return Simulation(case, names["prefill"], names["decode"]).run(trace)

    common = serve(_DEFAULTS)
    for role in _DEFAULTS:
        num_instances = case.num_prefill if role == "prefill" else case.num_decode
        for policy in policy_names(role) if num_instances > 1 else (_DEFAULTS[role],):
            outcome = common if policy == _DEFAULTS[role] else serve({**_DEFAULTS, role: policy})
            yield Row(case, role, policy, outcome)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for shape in get_args(Shape) if options.shape is None else (options.shape,):
        if options.prefill or options.decode or options.mixed:
            size = options.prefill or options.decode or _MIXED_SIZE
            yield Case(shape, size, options.decode or size, options.mixed)
        else:
            yield from (Case(shape, size, size) for size in _SIZES)
            yield Case(shape, _MIXED_SIZE, _MIXED_SIZE, is_mixed=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=_count, metavar="N", help="prefill instances; default 1, 4, 16 and 64")
    parser.add_argument("--decode", type=_count, metavar="M", help="decode instances; default: as many")
    parser.add_argument("--mixed", action="store_true", help="every fourth instance is half as fast")
    parser.add_argument("--shape", choices=get_args(Shape), help="default: both")
    parser.add_argument("--load", type=float, default=0.7, help="of what the busier role can do; default 0.7")
    parser.add_argument("--requests", type=_count, metavar="N", help="default 2000 + 400 for each prefill instance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("logs/simulate_policies"), help="folder")
    options = parser.parse_args(arguments)
    if not 0.0 < options.load <= 2.0:
        parser.error(f"--load {options.load:g}: choose a number above 0, up to 2")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    main()
